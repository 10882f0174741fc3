// Every gradient. A warp walks over the tiles of its stretch from the last to the first. In a tile it takes one state
// n at a time: it finds h again from the state saved before the tile, runs the adjoint g_t = C_t dy_t + flow_t,
// flow_{t-1} = A_bar_t g_t against the tokens, and adds what n gives to du, ddelta and dz in registers. What n gives
// to dB and dC is summed over the channels of the block in shared memory.

constexpr int PART = 2 * QUADS * 32;                 // float4s of dB and dC of a warp
constexpr int OUTPUTS = 2 * ROW;                     // float4s of dB and dC of a block
static_assert(OUTPUTS <= THREADS, "a thread for every four tokens of dB and dC");
constexpr int TENSORS = 3 + HAS_Z;

// Then the shared memory of a block holds, in float4s: delta, u, dy and z of each warp, dB and dC of each warp (two
// buffers), (A, state entering the tile, flow entering it from the right, dA) of each channel and n; in floats: the
// states entering the next tile, dD and ddelta_bias of each channel, and the gradients of a constant B and C.
constexpr int ALL_PARTS = ROWS + TENSORS * SLOTS * WARPS, RUNNING = ALL_PARTS + 2 * WARPS * PART;
constexpr int ENTERING = 4 * (RUNNING + BLOCK_D * ROW_A), SUMS = ENTERING + BLOCK_D * N, CONSTANTS = SUMS + 2 * BLOCK_D;

// The inputs of a lane's steps, and what they have gathered from the states so far.
struct Steps {
  float delta[STEPS], du[STEPS], dy[STEPS], y[STEPS], gB[STEPS], ddelta[STEPS], total;
};

// Sum over the lanes of a channel; valid in all of them.
__device__ __forceinline__ float sum_lanes(float v) {
#pragma unroll
  for (int r = CHANNELS; r < 32; r *= 2) v += __shfl_xor_sync(~0u, v, r);
  return v;
}

// State n of a tile in one warp. Leaves dB and dC of its steps in `part`, and in dA what its steps give to dA: its sum over
// the lanes is taken with the next state, beside whose scans its shuffles cost no time.
template <bool CUT>
__device__ __forceinline__ void one_state(const Params& p, const Place& w, const Cuts& cut, Steps& s, float4* running,
                                          const float4* const* rows, int n, float4* part, float* constants,
                                          const int* seq, float& dA) {
  const int64 table_row = (int64)p.channels * N, table_at = (int64)w.d * N + n;
  const float4 state = *running;
  const float A = state.x, A2 = A * LOG2E, B_here = B_CONSTANT ? p.B_constant[w.d * p.B_g + n * p.B_n] : 0.f,
              C_here = C_CONSTANT ? p.C_constant[w.d * p.C_g + n * p.C_n] : 0.f;
  float decay = ex2(A2 * s.total), decay_right = decay, h_end = w.j == 0 ? state.y : 0.f,
        flow = w.j == LANES - 1 ? state.z : 0.f, a[STEPS], h[STEPS];
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
      a[k] = ex2(A2 * s.delta[k]);
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
    round_from_right<true>(flow, decay_right, LANES / 2 * CHANNELS);
  }
  const float h_in = from_left(h_end, state.y, CHANNELS);
  float f = from_right(flow, state.z, CHANNELS), dB_sum = 0.f, dC_sum = 0.f;
  const float dA_before = sum_lanes(dA);
  dA = 0.f;
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
    else part[q * 32] = make_float4(dBs[0], dBs[1], dBs[2], dBs[3]);
    if (C_CONSTANT) dC_sum += dCs[0] + dCs[1] + dCs[2] + dCs[3];
    else part[PART / 2 + q * 32] = make_float4(dCs[0], dCs[1], dCs[2], dCs[3]);
  }
  if (B_CONSTANT) dB_sum = sum_lanes(dB_sum);
  if (C_CONSTANT) dC_sum = sum_lanes(dC_sum);
  __syncwarp();  // every lane has read the running numbers
  if (w.j == 0) {
    running->z = flow;
    if (n > 0) running[-1].w += dA_before;
    if (B_CONSTANT) constants[0] += dB_sum;
    if (C_CONSTANT) constants[1] += dC_sum;
  }
}

// The four tokens of dB or of dC that a thread sums over the channels of the block, for one n after another.
struct Share {
  const float4* from;  // in the parts of the first warp
  float* to;           // of n = 0 and t0 = 0
  int turn, t;         // each lane starts at another channel: other banks
  bool here;
};

__device__ __forceinline__ Share find_share(const Params& p, float4* memory, const Block& k, int slot) {
  constexpr int GROUP = 8 / CHANNELS > 0 ? 8 / CHANNELS : 1;
  const int out = thread_number(), of_C = out / ROW, q = out % ROW / LANES, j = out % LANES;
  const int span = of_C ? p.C_span : p.B_span, groups = p.channels / span, group = min(k.d_block, p.channels - 1) / span;
  Share s;
  s.t = j * STEPS + 4 * q;
  s.turn = j / GROUP % CHANNELS;
  s.from = memory + ALL_PARTS + of_C * (PART / 2) + q * 32 + j * CHANNELS;
  s.to = (of_C ? p.dC + slot * p.dC_slot : p.dB + slot * p.dB_slot) + ((int64)k.b * groups + group) * N * p.padded + s.t;
  s.here = out < OUTPUTS && !(of_C ? C_CONSTANT : B_CONSTANT);
  return s;
}

// To p.dB and p.dC at `to`, in any order (ORDERED 0), or by the one thread that writes there.
__device__ __forceinline__ void add_matrices(const float4* from, int turn, float* to, bool fresh) {
  float4 sum = from[turn];
#pragma unroll
  for (int e = 0; e < CHANNELS; e++)
#pragma unroll
    for (int v = e == 0; v < WARPS; v++) {
      float4 one = from[(e ^ turn) + v * PART];
      sum.x += one.x, sum.y += one.y, sum.z += one.z, sum.w += one.w;
    }
  if (!ORDERED) {
    add_global(to, sum);
  } else {
    float4* own = reinterpret_cast<float4*>(to);
    if (!fresh) sum.x += own->x, sum.y += own->y, sum.z += own->z, sum.w += own->w;
    *own = sum;
  }
}

// The sums over n become du, ddelta and dz of a lane's steps. slots: u, delta, dy and z of the tile once more.
__device__ __forceinline__ float finish_tile(const Params& p, const Place& w, const Steps& s, const uint4* slots, int t, int left) {
  const float bias = p.bias ? p.bias[w.d] : 0.f, skip = p.D ? p.D[w.d] : 0.f;
  float in[STEPS], out[STEPS], dbias = 0.f;
  auto again = [&](int slot, const io_t* tensor, int64 stride_b, int64 stride_d, int64 stride_l, float* to) {
    if (WIDE_ROWS) receive_tile(slots + slot * SLOTS, w, to);
    else load_steps(row_of(tensor, stride_b, stride_d, w.b, w.d) + steps_of(t, stride_l), stride_l, left, to);
  };
  if (HAS_Z) {
    again(3, p.z, p.z_b, p.z_d, p.z_l, in);
    again(2, p.dy, p.dy_b, p.dy_d, p.dy_l, out);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      const float v = sigmoid(in[i]);
      out[i] = out[i] * s.y[i] * v * fmaf(in[i], 1.f - v, 1.f);
    }
    store_steps(row_of(p.dz, p.dz_b, p.dz_d, w.b, w.d) + steps_of(t, p.dz_l), p.dz_l, left, out);
  }
#pragma unroll
  for (int i = 0; i < STEPS; i++) out[i] = fmaf(s.gB[i], s.delta[i], s.dy[i] * skip);
  store_steps(row_of(p.du, p.du_b, p.du_d, w.b, w.d) + steps_of(t, p.du_l), p.du_l, left, out);
  again(1, p.u, p.u_b, p.u_d, p.u_l, in);
  again(0, p.delta, p.delta_b, p.delta_d, p.delta_l, out);
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    const float slope = SOFTPLUS ? sigmoid(out[i] + bias) : 1.f;
    out[i] = fmaf(s.gB[i], in[i], s.ddelta[i]) * slope;
    if (i < left) dbias += out[i];
  }
  store_steps(row_of(p.ddelta, p.ddelta_b, p.ddelta_d, w.b, w.d) + steps_of(t, p.ddelta_l), p.ddelta_l, left, out);
  return dbias;
}
