// How a block is cut and how its data moves. A warp holds CHANNELS channels and, of each, LANES pieces of STEPS
// tokens: lane (j, c) = j * CHANNELS + c holds tokens t0 + STEPS j ... of channel c. ALONG warps of a block hold the
// same channels, one tile behind the other. Macros N, LANES, STEPS, WARPS, ALONG, MIN_BLOCKS, STAGE, WIDE_ROWS, WIDE_B,
// WIDE_C, HAS_Z, SOFTPLUS, B_CONSTANT, C_CONSTANT, PACKED, VARLEN, KEEP, BIG_STRIDES, UNROLL, REVERSE, BUFFERS (of B
// and C in float32) and ORDERED (sums: 0 in any order, 1 in one order into fresh memory, 2 in one order onto zeros) come
// from cuda_plan.py.
struct Params {
  const io_t *u, *delta, *B, *C, *z, *dy;
  const float *B_constant, *C_constant, *A, *D, *bias, *enter, *leave, *table, *dlast;
  const int* seq;
  const uint32* starts;
  io_t *y, *du, *ddelta, *dz;
  float *last, *states, *local, *total, *dA, *dB, *dC, *dD, *dbias, *dfirst, *dtable;
  int64 u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, dy_b, dy_d, dy_l, y_b, y_d, y_l;
  int64 du_b, du_d, du_l, ddelta_b, ddelta_d, ddelta_l, dz_b, dz_d, dz_l;
  int64 A_d, A_n, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l, dB_slot, dC_slot;
  int channels, seqlen, span, B_span, C_span, blocks, blocks_a_span, passes, chunks, stretch, stretches, padded, batch, words;
};

constexpr int CHANNELS = 32 / LANES, TILE = LANES * STEPS, BLOCK_L = TILE * ALONG, BLOCK_D = CHANNELS * WARPS / ALONG,
              THREADS = 32 * WARPS;
constexpr int WIDE = 16 / sizeof(io_t), PARTS = STEPS / WIDE, QUADS = STEPS / 4;  // 16-byte pieces, float4s of a lane
constexpr int WIDTH = LANES * PARTS;                      // 16-byte pieces of a channel's row in a tile
constexpr int CHUNK = 64;                                 // tokens between saved states
constexpr int STAGED = STAGE / BLOCK_L < N ? (STAGE / BLOCK_L > 0 ? STAGE / BLOCK_L : 1) : N;  // rows of B and C in SRAM at a time
constexpr int ROW = BLOCK_L / 4, MATRIX = STAGED * ROW;      // float4s of a row, of the staged rows of B or C
constexpr int ROW_PARTS = BLOCK_L / WIDE;                   // 16-byte pieces of a row
constexpr int ROWS_A_PASS = THREADS > ROW_PARTS ? THREADS / ROW_PARTS : 1, PASSES_A_ROW = ROWS_A_PASS * ROW_PARTS / THREADS;
constexpr int ROW_PASSES = (STAGED + ROWS_A_PASS - 1) / ROWS_A_PASS * PASSES_A_ROW;
constexpr bool WHOLE_PASSES = STAGED % ROWS_A_PASS == 0 && N % STAGED == 0;  // no pass ends in the middle
constexpr int RAW = ROW_PASSES * THREADS;                 // 16-byte pieces of B or C on their way
constexpr int SEATS = CHANNELS * WARPS;                   // a channel in a warp
constexpr int ROW_A = N + (CHANNELS > 1);                 // padded: the channels of a warp read different banks
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// What a block works on. It lies in shared memory, from where it is read when needed: in registers it would crowd out
// the states. The tensors begin at its sequence, B and C at its group of channels.
struct alignas(16) Block {
  int b, stretch, begin, end, d_block, d_end, spare[2];  // d_end: the first channel that is not its own
  const io_t *u, *delta, *z, *dy, *B, *C;
  io_t *y, *du, *ddelta, *dz;
  int64 dB_row, dC_row;  // numbers before row n = 0 of its group in p.dB and p.dC
};
constexpr int BLOCK_SIZE = sizeof(Block) / sizeof(float4);

__device__ __forceinline__ const Block& block_in(const float4* memory) { return *reinterpret_cast<const Block*>(memory); }

__device__ __forceinline__ void find_block(const Params& p, int pass, float4* memory) {
  __syncthreads();
  if (threadIdx.x == 0) {
    Block& k = *reinterpret_cast<Block*>(memory);
    const int block = blockIdx.x, group = block % p.blocks * p.passes + pass, span = group / p.blocks_a_span;
    k.stretch = block / p.blocks % p.stretches;
    k.b = block / (p.blocks * p.stretches);
    k.begin = k.stretch * p.stretch;
    k.end = min(k.begin + p.stretch, p.seqlen);
    k.d_block = min(span * p.span + group % p.blocks_a_span * BLOCK_D, p.channels);
    k.d_end = min((span + 1) * p.span, p.channels);
    k.u = p.u + k.b * p.u_b, k.delta = p.delta + k.b * p.delta_b, k.z = p.z + k.b * p.z_b, k.dy = p.dy + k.b * p.dy_b;
    k.y = p.y + k.b * p.y_b, k.du = p.du + k.b * p.du_b, k.ddelta = p.ddelta + k.b * p.ddelta_b, k.dz = p.dz + k.b * p.dz_b;
    const int first = min(k.d_block, k.d_end - 1), B_group = first / p.B_span, C_group = first / p.C_span;
    const int64 B_groups = p.channels / p.B_span, C_groups = p.channels / p.C_span, slot = ORDERED ? block % p.blocks : 0;
    k.B = p.B + k.b * p.B_b + B_group * p.B_g;
    k.C = p.C + k.b * p.C_b + C_group * p.C_g;
    k.dB_row = slot * p.dB_slot + (k.b * B_groups + B_group) * N * p.padded;
    k.dC_row = slot * p.dC_slot + (k.b * C_groups + C_group) * N * p.padded;
  }
  __syncthreads();
}

// Where a thread works in its block. Cheap to find again: see thread_number.
struct Place {
  int lane, warp, part, j, c, b, d_warp, local, seat, d, rows;  // part: which of ALONG tiles; rows: channels it has from d_warp on
  bool here;                                        // this lane's channel exists
};

__device__ __forceinline__ Place find_place(const Params& p, const Block& k) {
  Place w;
  const int thread = thread_number();
  w.lane = thread % 32;
  w.warp = thread / 32;
  w.part = w.warp % ALONG;
  w.j = w.lane / CHANNELS;
  w.c = w.lane % CHANNELS;
  w.b = k.b;
  w.local = w.warp / ALONG * CHANNELS + w.c;
  w.seat = w.warp * CHANNELS + w.c;
  w.d_warp = k.d_block + w.local - w.c;
  w.rows = max(0, min(CHANNELS, k.d_end - w.d_warp));
  w.here = w.c < w.rows;
  w.d = w.here ? w.d_warp + w.c : min(k.d_block, p.channels - 1);
  return w;
}

// index * stride, in 64 bits: from 32-bit factors where no stride needs more.
__device__ __forceinline__ int64 steps_of(int index, int64 stride) {
  return BIG_STRIDES ? index * stride : (int64)index * (int)stride;
}

// The row of channel d of a (D, L) tensor.
template <typename T>
__device__ __forceinline__ T* row_of(T* tensor, int64 stride_d, int d) {
  return tensor + steps_of(d, stride_d);
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + ex2(-x * LOG2E)); }

// log(1 + e^x) = max(x, 0) + log(1 + w), w = e^-|x| <= 1. The polynomial is within 6e-8 of log(1 + w) / w, so that
// small results keep their digits too.
__device__ __forceinline__ float softplus(float x) {
  constexpr float series[] = {0.99999994f, -0.49999493f, 0.33319098f, -0.24842982f, 0.19106005f,
                              -0.13663241f, 0.078225896f, -0.029505204f, 0.0052326857f};
  const float w = ex2(-fabsf(x) * LOG2E);
  float p = series[8];
#pragma unroll
  for (int i = 7; i >= 0; i--) p = fmaf(w, p, series[i]);
  return fmaf(w, p, fmaxf(x, 0.f));
}

__device__ __forceinline__ void spread(uint4 v, float* out) {
#if IO == 0
  out[0] = __uint_as_float(v.x), out[1] = __uint_as_float(v.y), out[2] = __uint_as_float(v.z), out[3] = __uint_as_float(v.w);
#else
  unpack(v.x, out[0], out[1]), unpack(v.y, out[2], out[3]), unpack(v.z, out[4], out[5]), unpack(v.w, out[6], out[7]);
#endif
}

__device__ __forceinline__ uint4 gather(const float* in) {
#if IO == 0
  return make_uint4(__float_as_uint(in[0]), __float_as_uint(in[1]), __float_as_uint(in[2]), __float_as_uint(in[3]));
#else
  return make_uint4(pack(in[0], in[1]), pack(in[2], in[3]), pack(in[4], in[5]), pack(in[6], in[7]));
#endif
}

__device__ __forceinline__ int bytes_left(int elements) { return min(max(elements * (int)sizeof(io_t), 0), 16); }

// STEPS elements of a lane, zero from number `left` on: one by one, with any stride.
__device__ __forceinline__ void load_steps(const io_t* at, int64 stride, int left, float* out) {
#pragma unroll
  for (int i = 0; i < STEPS; i++) out[i] = i < left ? to_float(at[steps_of(i, stride)]) : 0.f;
}

// The same, in pieces of 16 bytes where all of them are there.
__device__ __forceinline__ void load_row(const io_t* at, int64 stride, int left, float* out) {
  if (WIDE_ROWS && left >= STEPS) {
#pragma unroll
    for (int k = 0; k < PARTS; k++) spread(load_global(reinterpret_cast<const uint4*>(at) + k), out + k * WIDE);
  } else {
    load_steps(at, stride, left, out);
  }
}

__device__ __forceinline__ void store_steps(io_t* at, int64 stride, int left, const float* in) {
  if (WIDE_ROWS && left >= STEPS) {
#pragma unroll
    for (int k = 0; k < PARTS; k++) store_global(reinterpret_cast<uint4*>(at) + k, gather(in + k * WIDE));
  } else {
#pragma unroll
    for (int i = 0; i < STEPS; i++)
      if (i < left) at[steps_of(i, stride)] = from_float(in[i]);
  }
}

// A warp's slots hold its rows as they lie in memory; a little room between the rows keeps the lanes that read their
// own pieces out of each other's banks.
constexpr int NEAR = 8 / (CHANNELS < 8 ? CHANNELS : 8) * PARTS;  // pieces of a row that eight neighbouring lanes read
constexpr int PITCH = WIDTH + (CHANNELS == 1 ? 0 : NEAR < 8 ? NEAR : 1), SLOTS = CHANNELS * PITCH;

// Where a lane's copies of a tile go and come from: the same for every (D, L) tensor but for its strides.
struct Copies {
  int place[PARTS], row[PARTS], t[PARTS], bytes[PARTS];
};

__device__ __forceinline__ Copies find_copies(int t0, const Place& w, int seqlen) {
  constexpr int A_ROW = WIDTH > 32 ? WIDTH / 32 : 1, ROWS = WIDTH < 32 ? 32 / WIDTH : 1;  // copies a row, rows a copy
  Copies copies;
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    const int row = w.lane / WIDTH + i / A_ROW * ROWS, piece = w.lane % WIDTH + i % A_ROW * 32;
    copies.place[i] = row * PITCH + piece;
    copies.row[i] = w.d_warp + row;
    copies.t[i] = t0 + w.part * TILE + piece * WIDE;
    copies.bytes[i] = row < w.rows ? bytes_left(seqlen - copies.t[i]) : 0;
  }
  return copies;
}

// The same of the next tile.
__device__ __forceinline__ void to_next_tile(Copies& copies, int seqlen) {
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    copies.t[i] += BLOCK_L;
    if (copies.bytes[i]) copies.bytes[i] = bytes_left(seqlen - copies.t[i]);
  }
}

// Ask for the warp's rows of a (D, L) tensor.
__device__ __forceinline__ void request_tile(uint4* slots, const io_t* tensor, int64 stride_d, const Copies& copies) {
#pragma unroll
  for (int i = 0; i < PARTS; i++)
    copy_async(slots + copies.place[i], row_of(tensor, stride_d, copies.row[i]) + copies.t[i], copies.bytes[i]);
}

__device__ __forceinline__ void receive_tile(const uint4* slots, const Place& w, float* out) {
#pragma unroll
  for (int k = 0; k < PARTS; k++) spread(slots[w.c * PITCH + w.j * PARTS + k], out + k * WIDE);
}

// float4 q of lane j of a tile in a staged row of B or C: no bank conflicts for the threads that write and for those
// that read.
__device__ __forceinline__ int place_of(int q, int j, int part) {
  return part * (TILE / 4) + q * LANES + (j ^ (2 * q % LANES));
}

// Rows n0 ... n0 + STAGED of B or C, tokens t0 ... t0 + BLOCK_L, each 16-byte piece by the thread that converts it later.
__device__ __forceinline__ void request_matrix(uint4* raw, const io_t* matrix, int64 stride_n, int n0, int t0, int seqlen) {
  const int thread = thread_number(), first = thread % ROW_PARTS * WIDE;
  int n = n0 + thread / ROW_PARTS;
  const io_t* from = matrix + steps_of(n, stride_n) + t0 + first;
#pragma unroll
  for (int k = 0; k < ROW_PASSES; k++) {
    const int t = k % PASSES_A_ROW * THREADS * WIDE;
    if (WHOLE_PASSES || n < min(n0 + STAGED, N)) copy_async(raw + k * THREADS + thread, from + t, bytes_left(seqlen - t0 - first - t));
    if (k % PASSES_A_ROW == PASSES_A_ROW - 1) n += ROWS_A_PASS, from += steps_of(ROWS_A_PASS, stride_n);
  }
}

// The same rows in float32, each lane's steps in one place; with WIDE_MATRIX from `raw`, else straight from memory.
template <bool WIDE_MATRIX>
__device__ __forceinline__ void convert_matrix(float4* to, const uint4* raw, const io_t* matrix, int64 stride_n,
                                               int64 stride_l, int n0, int t0, int seqlen) {
  const int thread = thread_number();
  int m = thread / ROW_PARTS;
#pragma unroll
  for (int k = 0; k < ROW_PASSES; k++, m += k % PASSES_A_ROW ? 0 : ROWS_A_PASS) {
    const int t = (thread % ROW_PARTS + k % PASSES_A_ROW * THREADS) * WIDE, part = t / TILE, j = t % TILE / STEPS, q = t % STEPS / 4;
    if (!WHOLE_PASSES && m >= min(STAGED, N - n0)) break;
    float v[WIDE];
    if (WIDE_MATRIX)
      spread(raw[k * THREADS + thread], v);
    else
      for (int i = 0; i < WIDE; i++)
        v[i] = t0 + t + i < seqlen ? to_float(matrix[steps_of(n0 + m, stride_n) + steps_of(t0 + t + i, stride_l)]) : 0.f;
    to[m * ROW + place_of(q, j, part)] = make_float4(v[0], v[1], v[2], v[3]);
    if (WIDE == 8) to[m * ROW + place_of(q + 1, j, part)] = make_float4(v[WIDE - 4], v[WIDE - 3], v[WIDE - 2], v[WIDE - 1]);
  }
}

// Where the shared memory of a block holds, in float4s: B and C in float32, B and C on their way, the rows.
constexpr int MATRICES = BLOCK_SIZE, RAW_B = MATRICES + 2 * BUFFERS * MATRIX, RAW_C = RAW_B + RAW, ROWS = RAW_C + RAW;

__device__ __forceinline__ void request_matrices(const Params& p, float4* memory, const Block& k, int n0, int t0) {
  if (!B_CONSTANT && WIDE_B)
    request_matrix(reinterpret_cast<uint4*>(memory + RAW_B), k.B, p.B_n, n0, t0, p.seqlen);
  if (!C_CONSTANT && WIDE_C)
    request_matrix(reinterpret_cast<uint4*>(memory + RAW_C), k.C, p.C_n, n0, t0, p.seqlen);
}

__device__ __forceinline__ void convert_matrices(const Params& p, float4* memory, float4* to, const Block& k, int n0, int t0) {
  if (!B_CONSTANT)
    convert_matrix<WIDE_B>(to, reinterpret_cast<const uint4*>(memory + RAW_B), k.B,
                           p.B_n, p.B_l, n0, t0, p.seqlen);
  if (!C_CONSTANT)
    convert_matrix<WIDE_C>(to + MATRIX, reinterpret_cast<const uint4*>(memory + RAW_C),
                           k.C, p.C_n, p.C_l, n0, t0, p.seqlen);
}

// Where packed sequences start and end among a lane's steps, as bits; and how many lanes to the left (right) a scan
// may reach before a lane in which a sequence starts.
struct Cuts {
  uint32 starts, ends;
  int reach_left, reach_right;
  int most;                   // starts or ends of any lane: the same for all of a warp, and the compiler knows it
  bool any, begun, to_begin;  // a start: in the tile; up to and with this lane's steps; in or behind them
};
