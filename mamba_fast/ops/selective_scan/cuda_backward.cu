// Every gradient. A warp walks over the tiles of its stretch from the last to the first. In a tile it takes one state
// n at a time: it finds h again from the state saved before the tile, runs the adjoint g_t = C_t dy_t + flow_t,
// flow_{t-1} = A_bar_t g_t against the tokens, and adds what n gives to du, ddelta and dz in registers. What n gives
// to dB and dC is summed over the channels of the block in shared memory.

static_assert(LANES == 8 && STEPS == 8, "the sums of a warp over its channels are a fragment of a matrix product");
static_assert(ALONG == 1 || !ORDERED, "ordered sums are over warps that hold the same tokens");
constexpr int GROUP = WARPS > 4 ? 2 : WARPS;         // ordered sums: states between two barriers
constexpr int TENSORS = 3 + HAS_Z;
constexpr int SHARES = N <= 64 ? LANES : 1;          // places of a channel for dA: one a lane where there is room

// Then the shared memory of a block holds, in float4s: delta, u, dy and z of each warp (two buffers), the Ones of a warp's lanes; for
// ordered sums dB and dC of each warp for a group of states (two buffers); (A, state entering the tile, flow entering it
// from the right; the flow that leaves it) of each seat and n; in floats: the states entering the next tile, dA, dD and
// ddelta_bias of each seat (each a Sum), the gradients of a constant B and C, and with ALONG > 1, twice, the effect of
// each tile on each channel. The two flows change places at every tile.
constexpr int ALL_SLOTS = TENSORS * SLOTS * WARPS, ALL_ONES = ROWS + 2 * ALL_SLOTS, ALL_PARTS = ALL_ONES + 64, PARTS_OF_A_GROUP = GROUP * THREADS;
constexpr int RUNNING = ALL_PARTS + (ORDERED ? 2 * PARTS_OF_A_GROUP : 0), ENTERING = 4 * (RUNNING + SEATS * ROW_A);
constexpr int ALL_DA = ENTERING + SEATS * N, SUMS = ALL_DA + SEATS * SHARES * N, CONSTANTS = SUMS + 4 * SEATS;
constexpr int EFFECTS = CONSTANTS + (B_CONSTANT || C_CONSTANT ? 2 * SEATS * N : 0);

// A sum over many tiles, and what its last rounding lost (Kahan).
struct Sum {
  float total, lost;
};

__device__ __forceinline__ void add_exactly(Sum& sum, float v) {
  const float added = v - sum.lost, total = sum.total + added;
  sum.lost = (total - sum.total) - added;
  sum.total = total;
}

// The inputs of a lane's steps, and what they have gathered from the states so far. delta and total: times log2 e.
struct Steps {
  float delta[STEPS], du[STEPS], dy[STEPS], y[STEPS], gB[STEPS], ddelta[STEPS], total;
};

// Sum over the lanes of a channel; valid in all of them.
__device__ __forceinline__ float sum_lanes(float v) {
#pragma unroll
  for (int r = CHANNELS; r < 32; r *= 2) v += __shfl_xor_sync(~0u, v, r);
  return v;
}

// Where sums go: zeros and ones of a lane, for add_pair. From shared memory they take fewer instructions than to find.
union Ones {
  float4 quads[2];
  float2 pairs[4];
};

__device__ __forceinline__ void write_ones(float4* memory, int lane) {
  float* ones = reinterpret_cast<float*>(memory + ALL_ONES + lane);
  for (int i = 0; i < 8; i++) ones[i / 4 * 128 + i % 4] = lane / 4 == i ? 1.f : 0.f;
}

__device__ __forceinline__ Ones read_ones(const float4* memory, int lane) {
  Ones ones;
  ones.quads[0] = memory[ALL_ONES + lane], ones.quads[1] = memory[ALL_ONES + 32 + lane];
  return ones;
}

// What dB and dC of two neighbouring tokens add up to over the four channels of the warp: a product with zeros and ones.
// Lane l ends with dB (x, y) and dC (z, w) of tokens 2 l and 2 l + 1 of the tile. The product reads the upper 11 bits of
// a number: enough beside bfloat16, where what is lost on average is made up for (see KEPT in cuda_plan.py), else the
// rest is added too.
__device__ __forceinline__ void add_pair(float4& sum, int pair, const Ones& ones, float dB0, float dB1, float dC0, float dC1) {
  const float2 one = ones.pairs[pair];
  if (IO != 2) add_product(sum, rest(dB0), rest(dC0), rest(dB1), rest(dC1), one.x, one.y);
  add_product(sum, dB0, dC0, dB1, dC1, one.x, one.y);
}

// The flow that enters a lane's steps, from what its steps and those of the lanes to its right do to one. `flow` becomes
// what leaves the block's tiles.
template <bool CUT>
__device__ __forceinline__ float enter_lane(float& flow, float decay, float entering, Effect* effects, const Cuts& cut,
                                            const Place& w) {
  if (CUT && cut.to_begin) decay = SHUT;
  if (w.j == 0) effects[w.part * BLOCK_D + w.local] = {decay, flow};
  const Effect right = {from_right(decay, 1.f, CHANNELS), from_right(flow, 0.f, CHANNELS)};
  __syncthreads();
  float enter = entering;
  flow = entering;
  effects += w.local;
#pragma unroll 4
  for (int v = ALONG - 1; v >= 0; v--) {
    if (v == w.part) enter = flow;
    flow = pass<PACKED>(effects[v * BLOCK_D], flow);  // a sequence may start in another warp's tile
  }
  return pass<CUT>(right, enter);
}

// State n of a tile in one warp; returns dB and dC as add_pair leaves them. `parity` says which of the two flows of
// `running` enters, and the other one leaves.
template <bool CUT>
__device__ __forceinline__ float4 one_state(const Params& p, const Place& w, const Cuts& cut, Steps& s, float4* running,
                                          const float4* const* rows, const Ones& ones, int n, float* dA_place, float* constants,
                                            Effect* effects, const int* seq, int parity) {
  const int64 table_row = (int64)p.channels * N, table_at = (int64)w.d * N + n;
  const float4 state = *running;
  const float A = state.x, B_here = B_CONSTANT ? p.B_constant[w.d * p.B_g + n * p.B_n] : 0.f,
              C_here = C_CONSTANT ? p.C_constant[w.d * p.C_g + n * p.C_n] : 0.f;
  const float entering = parity ? state.w : state.z;  // the other one leaves: 3 - parity is its place
  float decay = ex2(A * s.total), decay_right = decay, h_end = w.j == 0 ? state.y : 0.f,
        flow = ALONG == 1 && w.j == LANES - 1 ? entering : 0.f, dA = SHARES > 1 ? *dA_place : 0.f, a[STEPS], h[STEPS];
  auto row = [&](bool of_C, int q, float* out) {
    float4 v = (of_C ? C_CONSTANT : B_CONSTANT) ? (of_C ? make_float4(C_here, C_here, C_here, C_here)
                                                        : make_float4(B_here, B_here, B_here, B_here))
                                                : rows[q][of_C ? MATRIX : 0];
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  };
  // The gradient of y_t: C_t dy_t, and where a sequence ends what its last state was worth.
  auto gradient = [&](int k, float C, float f) {
    float g = fmaf(s.dy[k], C, f);
    if (CUT && VARLEN && cut.ends >> k & 1) g += p.dlast[seq[k] * table_row + table_at];
    return g;
  };
#pragma unroll
  for (int q = 0; q < QUADS; q++) {
    float Bs[4];
    row(false, q, Bs);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int k = 4 * q + i;
      a[k] = ex2(A * s.delta[k]);
      h[k] = s.du[k] * Bs[i];
      if (CUT && cut.starts >> k & 1) {  // from here on h[k] holds Delta_t u_t B_t alone: see below for the table's part
        float from_table = VARLEN && p.table ? a[k] * p.table[seq[k] * table_row + table_at] : 0.f;
        h_end = from_table + h[k];
      } else {
        h_end = fmaf(a[k], h_end, h[k]);
      }
    }
  }
#pragma unroll
  for (int q = QUADS - 1; q >= 0; q--) {
    float Cs[4];
    row(true, q, Cs);
#pragma unroll
    for (int i = 3; i >= 0; i--) {
      const int k = 4 * q + i;
      flow = a[k] * gradient(k, Cs[i], flow);
      if (CUT && cut.starts >> k & 1) flow = 0.f;
    }
  }
  if (CUT) {
#pragma unroll
    for (int r = 1; r < LANES; r *= 2) {
      float h_left = __shfl_up_sync(~0u, h_end, r * CHANNELS), decay_left = __shfl_up_sync(~0u, decay, r * CHANNELS);
      float right = __shfl_down_sync(~0u, flow, r * CHANNELS), decay_far = __shfl_down_sync(~0u, decay_right, r * CHANNELS);
      if (cut.reach_left >= r) h_end = fmaf(decay, h_left, h_end), decay *= decay_left;
      if (cut.reach_right >= r) flow = fmaf(decay_right, right, flow), decay_right *= decay_far;
    }
  } else {
#pragma unroll
    for (int r = 1; r < LANES / 2; r *= 2) {
      round_from_left<false>(h_end, decay, r * CHANNELS);
      round_from_right<false>(flow, decay_right, r * CHANNELS);
    }
    round_from_left<true>(h_end, decay, LANES / 2 * CHANNELS);
    round_from_right<ALONG == 1>(flow, decay_right, LANES / 2 * CHANNELS);
  }
  const float h_in = from_left(h_end, state.y, CHANNELS);
  float f = ALONG == 1 ? from_right(flow, entering, CHANNELS) : enter_lane<CUT>(flow, decay_right, entering, effects, cut, w);
  float dB_sum = 0.f, dC_sum = 0.f;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  {
    float v = h_in;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      if (CUT && cut.starts >> k & 1) v = VARLEN && p.table ? p.table[seq[k] * table_row + table_at] : 0.f;
      v = fmaf(a[k], v, h[k]);
      h[k] = v;
    }
  }
#pragma unroll
  for (int q = QUADS - 1; q >= 0; q--) {
    float Bs[4], Cs[4], dBs[4], dCs[4];
    row(false, q, Bs);
    row(true, q, Cs);
#pragma unroll
    for (int i = 3; i >= 0; i--) {
      const int k = 4 * q + i;
      const float g = gradient(k, Cs[i], f);
      float before = k ? h[k - 1] : h_in;
      f = a[k] * g;
      if (CUT && cut.starts >> k & 1) before = VARLEN && p.table ? p.table[seq[k] * table_row + table_at] : 0.f;
      const float through_decay = f * before;
      s.ddelta[k] = fmaf(through_decay, A, s.ddelta[k]);
      dA = fmaf(through_decay, s.delta[k], dA);
      s.gB[k] = fmaf(g, Bs[i], s.gB[k]);
      if (HAS_Z) s.y[k] = fmaf(h[k], Cs[i], s.y[k]);
      dBs[i] = g * s.du[k];
      dCs[i] = h[k] * s.dy[k];
      if (CUT && cut.starts >> k & 1) {
        if (VARLEN && w.here && p.dtable) p.dtable[seq[k] * table_row + table_at] = f;
        f = 0.f;
      }
    }
    if (B_CONSTANT) dB_sum += dBs[0] + dBs[1] + dBs[2] + dBs[3];
    if (C_CONSTANT) dC_sum += dCs[0] + dCs[1] + dCs[2] + dCs[3];
    if (!B_CONSTANT || !C_CONSTANT) {
      add_pair(sum, 2 * q + 1, ones, dBs[2], dBs[3], dCs[2], dCs[3]);
      add_pair(sum, 2 * q, ones, dBs[0], dBs[1], dCs[0], dCs[1]);
    }
  }
  if (SHARES > 1) *dA_place = dA;
  else dA = sum_lanes(dA);
  if (B_CONSTANT) dB_sum = sum_lanes(dB_sum);
  if (C_CONSTANT) dC_sum = sum_lanes(dC_sum);
  if (ALONG == 1) __syncwarp();  // every lane has read what is about to change
  if (w.j == 0) {
    reinterpret_cast<float*>(running)[3 - parity] = flow;
    if (SHARES == 1) *dA_place += dA;
    if (B_CONSTANT) constants[0] += dB_sum;
    if (C_CONSTANT) constants[1] += dC_sum;
  }
  return sum;
}

// Where two tokens of dB and of dC go, of one state after another. Rows of p.dB and p.dC end with a tile.
struct Target {
  float *dB, *dC;
};

__device__ __forceinline__ Target find_target(const Params& p, const Block& k, int n, int t) {
  const int64 at = (int64)n * p.padded + t;
  return {p.dB + k.dB_row + at, p.dC + k.dC_row + at};
}

// In any order, or by the one thread that writes there.
__device__ __forceinline__ void add_matrix(float* to, float first, float second, bool fresh) {
  if (!ORDERED) {
    add_global(to, first, second);
  } else {
    float2* own = reinterpret_cast<float2*>(to);
    if (!fresh) first += own->x, second += own->y;
    *own = make_float2(first, second);
  }
}

__device__ __forceinline__ void add_matrices(const Target& target, float4 sum, bool fresh) {
  if (!B_CONSTANT) add_matrix(target.dB, sum.x, sum.y, fresh);
  if (!C_CONSTANT) add_matrix(target.dC, sum.z, sum.w, fresh);
}

// Ordered: dB and dC of `count` states from n on, summed over the warps, a state a warp.
__device__ __forceinline__ void add_group(const Params& p, const Block& k, const float4* parts, int n, int count, int t0, bool fresh) {
  const int thread = thread_number(), m = thread / 32;
  if (m >= count) return;
  float4 sum = parts[thread];
#pragma unroll
  for (int v = 1; v < WARPS; v++) {
    float4 one = parts[v * 32 * GROUP + thread];
    sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
  }
  add_matrices(find_target(p, k, n + m, t0 + 2 * (thread % 32)), sum, fresh);
}

// The sums over n become du, ddelta and dz of a lane's steps, and y where it is asked for. slots: u, delta, dy and z
// of the tile once more.
__device__ __forceinline__ float finish_tile(const Params& p, const Block& k, const Place& w, const Steps& s, const uint4* slots, int t, int left) {
  const float bias = p.bias ? p.bias[w.d] : 0.f, skip = p.D ? p.D[w.d] : 0.f;
  float in[STEPS], out[STEPS], dbias = 0.f;
  auto again = [&](int slot, const io_t* tensor, int64 stride_d, int64 stride_l, float* to) {
    if (WIDE_ROWS) receive_tile(slots + slot * SLOTS, w, to);
    else load_steps(row_of(tensor, stride_d, w.d) + steps_of(t, stride_l), stride_l, left, to);
  };
  if (HAS_Z) {
    again(3, k.z, p.z_d, p.z_l, in);
    again(2, k.dy, p.dy_d, p.dy_l, out);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const float v = sigmoid(in[i]);
      out[i] = out[i] * s.y[i] * v * fmaf(in[i], 1.f - v, 1.f);
    }
    store_steps(row_of(k.dz, p.dz_d, w.d) + steps_of(t, p.dz_l), p.dz_l, left, out);
    if (p.y) {
#pragma unroll
      for (int i = 0; i < STEPS; i++) out[i] = s.y[i] * in[i] * sigmoid(in[i]);
      store_steps(row_of(k.y, p.y_d, w.d) + steps_of(t, p.y_l), p.y_l, left, out);
    }
  }
#pragma unroll
  for (int i = 0; i < STEPS; i++) out[i] = fmaf(s.gB[i] * LN2, s.delta[i], s.dy[i] * skip);
  store_steps(row_of(k.du, p.du_d, w.d) + steps_of(t, p.du_l), p.du_l, left, out);
  again(1, k.u, p.u_d, p.u_l, in);
  again(0, k.delta, p.delta_d, p.delta_l, out);
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const float slope = SOFTPLUS ? sigmoid(out[i] + bias) : 1.f;
    out[i] = fmaf(s.gB[i], in[i], s.ddelta[i]) * slope;
    if (i < left) dbias += out[i];
  }
  store_steps(row_of(k.ddelta, p.ddelta_d, w.d) + steps_of(t, p.ddelta_l), p.ddelta_l, left, out);
  return dbias;
}
