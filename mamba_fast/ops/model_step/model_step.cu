// One token of BATCH sequences through a whole model in one launch; README.md has the phases.
// Macros: those of step_product.cuh, and WIDE_STATES, BLOCKS, LAYERS, D_MODEL, D_INNER, DT_RANK, D_STATE, WIDTH.
#define LOG2E 1.4426950408889634f
#define RANKS (DT_RANK + 2 * D_STATE)                                // rows of x_proj: Δ, B, C
#define OWN ((D_INNER / 4 + BLOCKS - 1) / BLOCKS * 4)                // most channels of a block
#define PIECES ((OWN + 15) / 16)                                     // of 16 channels
#define LANES 4                                                      // of a channel in the recurrence
#define STATES ((D_STATE + LANES - 1) / LANES)                       // of a channel, a lane
#define RANKS_A_LANE ((DT_RANK + 8 * LANES - 1) / (8 * LANES))       // words of 8
#define QUADS (BATCH * RANKS / 4)                                    // float4s of the ranks of all sequences
#define READERS (WORKERS / QUADS > 1 ? WORKERS / QUADS : 1)          // threads that sum up one of them
#define IN_TWO (QUADS > 64)                                         // sums of the ranks: first a share a block, then all

#if WIDE_STATES
typedef float state_t;
__device__ __forceinline__ float from_state(state_t v) { return v; }
__device__ __forceinline__ state_t to_state(float v) { return v; }
#else
typedef io_t state_t;
__device__ __forceinline__ float from_state(state_t v) { return to_float(v); }
__device__ __forceinline__ state_t to_state(float v) { return from_float(v); }
#endif

struct Layer {
  const io_t *norm, *in_proj, *conv, *conv_bias, *x_proj, *dt_proj, *dt_bias;
  const float *A_log, *D;
  const io_t* out_proj;
  state_t *conv_state, *ssm_state;
};

struct Params {
  const Layer* layers;
  const io_t *embedding, *norm_f, *head;
  const int64* tokens;
  io_t* logits;
  float *residual, *partial, *ranks;  // (BATCH, D_MODEL); (BLOCKS, BATCH, RANKS) and its sum over the blocks
  io_t* y;                    // (BATCH, D_INNER)
  uint32 *arrivals, *start;   // the grid's barrier, and what it read when the last launch ended
  int vocab;
  float eps;
};

struct Room {  // shared memory
  io_t pieces[RING][PIECE];
  gate_t full[RING], empty[RING];
  Layer layers[LAYERS];
  float sums[WARPS * GROUP * BATCH];
  float squares[WARPS * 8];
  float z[OWN * BATCH];
  alignas(16) float ranks[BATCH * RANKS];
  float4 shares[READERS * QUADS];
  io_t u[8 * PIECES * 16];  // (sequence, channel), zeros beyond
};

__device__ __forceinline__ float sigmoid(float v) { return reciprocal(1.f + ex2(-LOG2E * v)); }
__device__ __forceinline__ float rounded(float v) { return to_float(from_float(v)); }

// x = RMSNorm of the residual stream; source(b, k, f) gives eight numbers of it.
template <class Source>
__device__ __forceinline__ void normalised(uint4 (&x)[Product<D_MODEL>::PARTS], float* squares, const io_t* weight,
                                           float eps, Source source) {
  constexpr int PARTS = Product<D_MODEL>::PARTS;
  float v[PARTS][8], square = 0.f;
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    int k = Product<D_MODEL>::column(part);
    float w[8] = {};
    for (int i = 0; i < 8; i++) v[part][i] = 0.f;
    if (lane_row() < BATCH && k < D_MODEL) source(lane_row(), k, v[part]), unpack_eight(read_once(weight + k), w);
#pragma unroll
    for (int i = 0; i < 8; i++) square += v[part][i] * v[part][i], v[part][i] *= w[i];
  }
  for (int hop = 1; hop < 4; hop *= 2) square += __shfl_xor_sync(~0u, square, hop);
  if (lane_place() == 0) squares[warp_number() * 8 + lane_row()] = square;
  meet_in_block(WORKERS);
  float sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) sum += squares[warp * 8 + lane_row()];
  float scale = rsqrtf(sum / D_MODEL + eps);
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    for (int i = 0; i < 8; i++) v[part][i] *= scale;
    x[part] = pack_eight(v[part]);
  }
}

// The window of one channel before this token, and its taps, as they lie in memory: a conversion would wait for them.
struct Window {
  state_t kept[WIDTH];
  io_t taps[WIDTH], bias;

  __device__ __forceinline__ void read(const Layer& layer, int b, int d) {
    const state_t* from = layer.conv_state + ((int64)b * D_INNER + d) * WIDTH;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) kept[k] = from[k], taps[k] = layer.conv[d * WIDTH + k];
    if (layer.conv_bias) bias = layer.conv_bias[d];
  }

  // u = SiLU(conv(x)); the window moves on by x.
  __device__ __forceinline__ io_t step(const Layer& layer, int b, int d, float x) {
    state_t* to = layer.conv_state + ((int64)b * D_INNER + d) * WIDTH;
    float sum = layer.conv_bias ? to_float(bias) : 0.f;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
      state_t entry = k + 1 < WIDTH ? kept[(k + 1) % WIDTH] : to_state(rounded(x));
      to[k] = entry;
      sum += from_state(entry) * to_float(taps[k]);
    }
    return from_float(sum * sigmoid(sum));
  }
};

// This block's channels times its columns of x_proj: its part of Δ, B and C of every sequence.
struct Ranks {
  uint2 low[PIECES], high[PIECES];

  __device__ __forceinline__ void read(const Layer& layer, Share own, int tile) {
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      int k = piece * 16 + lane_place() * 4, row = tile * 16 + lane_row();
      const io_t* from = layer.x_proj + (int64)row * D_INNER + own.first + k;
      bool there = k < own.count;
      low[piece] = there && row < RANKS ? read_once_half(from) : make_uint2(0, 0);
      high[piece] = there && row + 8 < RANKS ? read_once_half(from + 8 * (int64)D_INNER) : make_uint2(0, 0);
    }
  }

  __device__ __forceinline__ void write(const Params& p, const io_t* u, int tile) {
    float c[4] = {};
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
      multiply(c, low[piece], high[piece], *(const uint2*)(u + lane_row() * PIECES * 16 + piece * 16 + lane_place() * 4));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int row = tile * 16 + lane_row() + i / 2 * 8, b = 2 * lane_place() + i % 2;
      if (row < RANKS && b < BATCH) p.partial[(blockIdx.x * BATCH + b) * RANKS + row] = c[i];
    }
  }
};

// ranks (BATCH, RANKS) in shared memory: the sum of what all blocks found.
__device__ __forceinline__ void sum_ranks(const Params& p, Room& room, uint32& due) {
#if IN_TWO
  Share share(BATCH * RANKS, BLOCKS);  // a warp a number: its lanes share the blocks out
  for (int i = warp_number(); i < share.count; i += WARPS) {
    float sum = 0.f;
#pragma unroll
    for (int block = threadIdx.x % 32; block < BLOCKS; block += 32)
      sum += read_shared(p.partial + block * BATCH * RANKS + share.first + i);
    for (int hop = 16; hop; hop /= 2) sum += __shfl_xor_sync(~0u, sum, hop);
    if (threadIdx.x % 32 == 0) p.ranks[share.first + i] = rounded(sum);
  }
  meet(p.arrivals, due, BLOCKS, WORKERS);
  for (int i = threadIdx.x; i < BATCH * RANKS; i += WORKERS) room.ranks[i] = read_shared(p.ranks + i);
#else
  for (int i = threadIdx.x; i < READERS * QUADS; i += WORKERS) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 16
    for (int block = i / QUADS; block < BLOCKS; block += READERS) {
      uint4 v = read_shared((const uint4*)p.partial + block * QUADS + i % QUADS);
      sum.x += __uint_as_float(v.x), sum.y += __uint_as_float(v.y);
      sum.z += __uint_as_float(v.z), sum.w += __uint_as_float(v.w);
    }
    room.shares[i] = sum;
  }
  meet_in_block(WORKERS);
  for (int i = threadIdx.x; i < BATCH * RANKS; i += WORKERS) {
    float sum = 0.f;
    for (int reader = 0; reader < READERS; reader++) sum += ((const float*)room.shares)[reader * QUADS * 4 + i];
    room.ranks[i] = rounded(sum);
  }
#endif
  meet_in_block(WORKERS);
}

// A channel of a sequence in LANES lanes: what `advance` needs of it, read ahead.
struct Channel {
  state_t h[STATES];
  io_t bias;
  float A[STATES], D;
  uint4 dt_proj[RANKS_A_LANE];

  __device__ __forceinline__ void read(const Layer& layer, int b, int d) {
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int j = 0; j < RANKS_A_LANE; j++) {
      int r = 8 * (lane + LANES * j);
      dt_proj[j] = r < DT_RANK ? read_once(layer.dt_proj + (int64)d * DT_RANK + r) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < STATES; j++) {
      int n = lane * STATES + j;
      if (n >= D_STATE) continue;
      h[j] = layer.ssm_state[((int64)b * D_INNER + d) * D_STATE + n];
      A[j] = layer.A_log[(int64)d * D_STATE + n];
    }
    bias = layer.dt_bias[d], D = layer.D[d];
  }

  // h = exp(Δ A) h + Δ B u, y = (C h + D u) SiLU(z); ranks (RANKS,) of this sequence.
  // Every lane of the warp comes here, and those without a channel (`live` is false) write nothing.
  __device__ __forceinline__ float advance(const Layer& layer, const float* ranks, int b, int d, float u, float z,
                                           bool live) {
    int lane = threadIdx.x % LANES;
    float Delta = 0.f, y = 0.f;
#pragma unroll
    for (int j = 0; j < RANKS_A_LANE; j++) {
      float w[8];
      unpack_eight(dt_proj[j], w);
      int r = 8 * (lane + LANES * j);
      if (r >= DT_RANK) continue;
      float4 low = *(const float4*)(ranks + r), high = *(const float4*)(ranks + r + 4);
      Delta += w[0] * low.x + w[1] * low.y + w[2] * low.z + w[3] * low.w;
      Delta += w[4] * high.x + w[5] * high.y + w[6] * high.z + w[7] * high.w;
    }
    for (int hop = LANES / 2; hop; hop /= 2) Delta += __shfl_xor_sync(~0u, Delta, hop);
    Delta = rounded(Delta) + to_float(bias);
    Delta = Delta > 20.f ? Delta : log1pf(ex2(LOG2E * Delta));
#pragma unroll
    for (int j = 0; j < STATES; j++) {
      int n = lane * STATES + j;
      if (n >= D_STATE) continue;
      float decay = ex2(-LOG2E * Delta * ex2(LOG2E * A[j]));
      float next = decay * from_state(h[j]) + Delta * u * ranks[DT_RANK + n];
      if (live) layer.ssm_state[((int64)b * D_INNER + d) * D_STATE + n] = to_state(next);
      y += next * ranks[DT_RANK + D_STATE + n];
    }
    for (int hop = LANES / 2; hop; hop /= 2) y += __shfl_xor_sync(~0u, y, hop);
    return (y + u * D) * z * sigmoid(z);
  }
};

// What a block will read of a layer's small tensors comes to the second-level cache meanwhile, a line of 128 bytes at a
// time; most of it is the first touch of a page, which takes microseconds.
__device__ __forceinline__ void fetch_small(const Layer& layer, Share own) {
  int me = threadIdx.x;
  for (int e = 64 * me; e < D_MODEL; e += 64 * WORKERS) fetch_to_l2(layer.norm + e);
  for (int row = me; row < RANKS; row += WORKERS) fetch_to_l2(layer.x_proj + (int64)row * D_INNER + own.first);
  for (int i = 64 * me; i < own.count * DT_RANK; i += 64 * WORKERS) fetch_to_l2(layer.dt_proj + (int64)own.first * DT_RANK + i);
  for (int i = me * 16; i < own.count * D_STATE; i += 16 * WORKERS) fetch_to_l2(layer.A_log + own.first * D_STATE + i);
  for (int i = me; i < own.count * BATCH; i += WORKERS) {
    int64 at = (int64)(i % BATCH) * D_INNER + own.first + i / BATCH;
    fetch_to_l2(layer.ssm_state + at * D_STATE);
    if (i / BATCH % 4 == 0) fetch_to_l2(layer.conv_state + at * WIDTH);
  }
  if (me >= own.count || me % 16) return;
  fetch_to_l2(layer.conv + (own.first + me) * WIDTH), fetch_to_l2(layer.dt_bias + own.first + me);
  fetch_to_l2(layer.D + own.first + me);
  if (layer.conv_bias) fetch_to_l2(layer.conv_bias + own.first + me);
}

// y of this block's channels; `ready` is the first channel of these lanes, and the next one is read meanwhile.
__device__ __forceinline__ void advance_all(const Layer& layer, const Params& p, Room& room, Share own, Channel ready) {
  constexpr int GROUPS = WORKERS / LANES, ROUNDS = (OWN * BATCH + GROUPS - 1) / GROUPS;
#pragma unroll 1
  for (int round = 0; round < ROUNDS; round++) {
    int j = threadIdx.x / LANES + round * GROUPS, after = j + GROUPS;
    bool live = j < own.count * BATCH;
    int i = live ? j / BATCH : 0, b = live ? j % BATCH : 0;
    Channel next = ready;
    if (ROUNDS > 1 && after < own.count * BATCH) next.read(layer, after % BATCH, own.first + after / BATCH);
    float u = to_float(room.u[b * PIECES * 16 + i]);
    float y = ready.advance(layer, room.ranks + b * RANKS, b, own.first + i, u, room.z[i * BATCH + b], live);
    if (live && threadIdx.x % LANES == 0) p.y[b * D_INNER + own.first + i] = from_float(y);
    ready = next;
  }
}

// The numbers of a layer and of the end that other blocks' work does not change.
__device__ __forceinline__ void bring_weights(const Params& p, Ring ring, Share own) {
  for (int i = 0; i < LAYERS; i++) {
    ring.bring<D_MODEL>(Rows(p.layers[i].in_proj, own, D_INNER));
    ring.bring<D_INNER>(Rows(p.layers[i].out_proj, Share(D_MODEL, BLOCKS)));
  }
  ring.bring<D_MODEL>(Rows(p.head, Share(p.vocab, BLOCKS)));
}

struct Residual {
  const Params& p;
  int layer;  // before the first one it is the embedding

  __device__ __forceinline__ void operator()(int b, int k, float (&f)[8]) const {
    if (layer == 0) return unpack_eight(read_once(p.embedding + p.tokens[b] * D_MODEL + k), f);
    uint4 low = read_shared((const uint4*)(p.residual + b * D_MODEL + k));
    uint4 high = read_shared((const uint4*)(p.residual + b * D_MODEL + k + 4));
    f[0] = __uint_as_float(low.x), f[1] = __uint_as_float(low.y), f[2] = __uint_as_float(low.z);
    f[3] = __uint_as_float(low.w), f[4] = __uint_as_float(high.x), f[5] = __uint_as_float(high.y);
    f[6] = __uint_as_float(high.z), f[7] = __uint_as_float(high.w);
  }

  __device__ __forceinline__ float operator()(int b, int e) const {
    return layer ? read_shared(p.residual + b * D_MODEL + e) : to_float(p.embedding[p.tokens[b] * D_MODEL + e]);
  }
};

// in_proj, convolution, and this block's part of x_proj.
__device__ __forceinline__ void widen(const Layer& layer, const Params& p, Room& room, Ring& ring, Share own, uint4 (&x)[Product<D_MODEL>::PARTS], Window window) {
  Ranks ranks;
  ranks.read(layer, own, warp_number());
  Product<D_MODEL>::results(ring, 2 * own.count, x, room.sums, [&](int row, int b, float value, bool first) {
    if (row >= own.count) {
      room.z[(row - own.count) * BATCH + b] = rounded(value);
      return;
    }
    if (!first) window.read(layer, b, own.first + row);
    room.u[b * PIECES * 16 + row] = window.step(layer, b, own.first + row, value);
  });
  for (int tile = warp_number(); tile * 16 < RANKS; tile += WARPS) {
    if (tile >= WARPS) ranks.read(layer, own, tile);
    ranks.write(p, room.u, tile);
  }
}

__device__ __forceinline__ void work(const Params& p, Room& room, Ring ring, Share own) {
  uint32 due = *p.start;
  uint4 x[Product<D_MODEL>::PARTS], y[Product<D_INNER>::PARTS];
  int mine = threadIdx.x / BATCH, sequence = threadIdx.x % BATCH;  // of the products' results
  int channel = threadIdx.x / LANES;                                  // of the recurrence
  Share outs(D_MODEL, BLOCKS), words(p.vocab, BLOCKS);
  for (int i = 0; i < LAYERS; i++) {
    const Layer& layer = room.layers[i];
    Residual residual{p, i};
    Window window;
    if (mine < own.count) window.read(layer, sequence, own.first + mine);
    if (i) meet(p.arrivals, due, BLOCKS, WORKERS);
    normalised(x, room.squares, layer.norm, p.eps, residual);
    if (i + 1 < LAYERS) fetch_small(room.layers[i + 1], own);
    widen(layer, p, room, ring, own, x, window);
    Channel ready;
    if (channel < own.count * BATCH) ready.read(layer, channel % BATCH, own.first + channel / BATCH);
    float before = mine < outs.count ? residual(sequence, outs.first + mine) : 0.f;
    meet(p.arrivals, due, BLOCKS, WORKERS);
    sum_ranks(p, room, due);
    advance_all(layer, p, room, own, ready);
    meet(p.arrivals, due, BLOCKS, WORKERS);
    Product<D_INNER>::read(y, p.y);
    Product<D_INNER>::results(ring, outs.count, y, room.sums, [&](int row, int b, float value, bool first) {
      p.residual[b * D_MODEL + outs.first + row] = (first ? before : residual(b, outs.first + row)) + rounded(value);
    });
  }
  meet(p.arrivals, due, BLOCKS, WORKERS);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.start = due;
  normalised(x, room.squares, p.norm_f, p.eps, Residual{p, LAYERS});
  Product<D_MODEL>::results(ring, words.count, x, room.sums, [&](int row, int b, float value, bool) {
    p.logits[(int64)b * p.vocab + words.first + row] = from_float(value);
  });
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, 1) model_step(const __grid_constant__ Params p) {
  Room& room = *(Room*)memory;
  Share own(D_INNER / 4, BLOCKS);
  own.first *= 4, own.count *= 4;
  for (int i = threadIdx.x; i < LAYERS * sizeof(Layer) / 8; i += WORKERS + 32)
    ((int64*)room.layers)[i] = ((const int64*)p.layers)[i];
  for (int i = threadIdx.x; i < 8 * PIECES * 16; i += WORKERS + 32) room.u[i] = from_float(0.f);
  if (threadIdx.x == 0)
    for (int i = 0; i < RING; i++) make_gate(room.full + i, 1), make_gate(room.empty + i, WARPS);
  if (threadIdx.x == 0) gates_made();
  __syncthreads();
  Ring ring = {room.pieces, room.full, room.empty, 0};
  if (threadIdx.x < WORKERS) work(p, room, ring, own);
  else if (threadIdx.x == WORKERS) bring_weights(p, ring, own);
}
