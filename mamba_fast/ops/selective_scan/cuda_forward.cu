// y and the last states. A warp walks over the tiles of its stretch of tokens; in a tile it takes one state n at a
// time: each lane runs its steps from zero, a scan over the lanes finds the state that enters each of them, and each
// lane runs its steps again from there. Where warps stand one behind the other they tell each other, for each n, what
// their tiles do to a state.

// What a lane keeps of state n between its two runs: A_bar_t and Delta_t u_t B_t, and the state before its steps.
struct Run {
  float a[STEPS], x[STEPS], h;
  bool select;
};

// Where a sequence starts Delta is taken to be FAR, so that a decay is zero and the steps need not ask. That is not
// enough where a decay of zero meets a NaN or infinity, where A is not negative, and where the start has a state of its
// own: then a run is made again, and each step selects.
constexpr float FAR = 1e30f, LEAST = -1e-20f, LARGEST = 3e38f;

// Then the shared memory of a block holds delta, u and z of each warp, (A log2 e, running state) of each channel and n,
// and with ALONG > 1, twice, the effect of each warp's tile on each channel.
constexpr int RUNNING = ROWS + 3 * SLOTS * WARPS, EFFECTS_BEHIND = BLOCK_D * ROW_A;

// The state that enters a lane's steps, from what its steps and those of the lanes to its left do to one.
template <bool CUT>
__device__ __forceinline__ float enter_lane(float h, float decay, float2* running, Effect* effects, const Cuts& cut,
                                            const Place& w) {
  const float carry = running->y;
  if (CUT && cut.begun) decay = SHUT;
  if (w.j == LANES - 1) effects[w.part * BLOCK_D + w.local] = {decay, h};
  const Effect left = {from_left(decay, 1.f, CHANNELS), from_left(h, 0.f, CHANNELS)};
  __syncthreads();  // a warp with cuts comes here from another copy of this code: both make as many barriers
  float enter = carry;
#pragma unroll
  for (int v = 0; v < ALONG - 1; v++) {
    const Effect effect = effects[v * BLOCK_D + w.local];
    if (v < w.part) enter = pass<PACKED>(effect, enter);  // a sequence may start in another warp's tile
  }
  if (w.part == ALONG - 1 && w.j == LANES - 1) running->y = pass<CUT>({decay, h}, enter);
  return pass<CUT>(left, enter);
}

// A lane's steps from the state h on, handing each state to `take`.
template <typename Take>
__device__ __forceinline__ float run_selecting(const Run& run, uint32 starts, float h, Take take) {
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    h = starts >> i & 1 ? run.x[i] : fmaf(run.a[i], h, run.x[i]);
    take(i, h);
  }
  return h;
}

// Where a sequence starts among a lane's steps, what its first state gives: one start of each lane at a time.
__device__ __forceinline__ void add_first_states(Run& run, const Cuts& cut, const float* table, const int* seq, int64 row) {
  uint32 starts = cut.starts;
#pragma unroll 1
  for (int k = 0; k < cut.most; k++) {
    const int first = __ffs(starts) - 1;
    const float state = first >= 0 ? table[seq[first] * row] : 0.f;
    starts &= starts - 1;
#pragma unroll
    for (int i = 0; i < STEPS; i++)
      if (i == first) run.x[i] = fmaf(run.a[i], state, run.x[i]);
  }
}

// The states with which sequences end among a lane's steps: one end of each lane at a time.
__device__ __forceinline__ void write_last_states(const Run& run, const Cuts& cut, float* last, const int* seq, int64 row) {
  uint32 ends = last ? cut.ends : 0;
#pragma unroll 1
  for (int k = 0; k < cut.most; k++) {
    const int end = __ffs(ends) - 1;
    float found = 0.f;
    ends &= ends - 1;
    run_selecting(run, cut.starts, run.h, [&](int i, float h) { found = i == end ? h : found; });
    if (end >= 0) last[seq[end] * row] = found;
  }
}

template <bool CUT>
__device__ __forceinline__ void first_run(Run& run, const float4* const* rows, float2* running, Effect* effects,
                                          const float* delta, const float* du, float total, float B_here, const Cuts& cut,
                                          bool from_table, const float* table, const int* seq, int64 table_row,
                                          const Place& w) {
  const float A2 = running->x, carry = running->y;
  float decay = ex2(A2 * total), h = ALONG == 1 && w.j == 0 ? carry : 0.f;
#pragma unroll
  for (int q = 0; q < QUADS; q++) {
    float4 v = B_CONSTANT ? make_float4(B_here, B_here, B_here, B_here) : rows[q][0];
    run.x[4 * q] = v.x * du[4 * q];
    run.x[4 * q + 1] = v.y * du[4 * q + 1];
    run.x[4 * q + 2] = v.z * du[4 * q + 2];
    run.x[4 * q + 3] = v.w * du[4 * q + 3];
  }
#pragma unroll
  for (int i = 0; i < STEPS; i++) run.a[i] = ex2(A2 * delta[i]);
  if (CUT && VARLEN && from_table) add_first_states(run, cut, table, seq, table_row);
  const float first = h;
#pragma unroll
  for (int i = 0; i < STEPS; i++) h = fmaf(run.a[i], h, run.x[i]);
  if (CUT) {
    run.select = __any_sync(~0u, (VARLEN && from_table) || (cut.starts && !(A2 < LEAST && fabsf(h) < LARGEST)));
    if (run.select) h = run_selecting(run, cut.starts, first, [](int, float) {});
#pragma unroll
    for (int r = 1; r < LANES; r *= 2) {
      float h_left = __shfl_up_sync(~0u, h, r * CHANNELS), decay_left = __shfl_up_sync(~0u, decay, r * CHANNELS);
      if (cut.reach_left >= r) h = fmaf(decay, h_left, h), decay *= decay_left;
    }
  } else {
#pragma unroll
    for (int r = 1; r < LANES / 2; r *= 2) round_from_left<false>(h, decay, r * CHANNELS);
    round_from_left<ALONG == 1>(h, decay, LANES / 2 * CHANNELS);
  }
  if (ALONG > 1) {
    run.h = enter_lane<CUT>(h, decay, running, effects, cut, w);
    return;
  }
  __syncwarp();  // every lane has read the running state
  if (w.j == LANES - 1) running->y = h;
  run.h = from_left(h, carry, CHANNELS);
}

template <bool CUT>
__device__ __forceinline__ void second_run(Run& run, const float4* const* rows, float* y, float C_here,
                                           const Cuts& cut, float* last, const int* seq, int64 table_row) {
  float h = run.h, cut_off[STEPS];
  if (CUT) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) cut_off[i] = h = fmaf(run.a[i], h, run.x[i]);
    if (__any_sync(~0u, run.select || (cut.starts && !(fabsf(h) < LARGEST))))
      run_selecting(run, cut.starts, run.h, [&](int i, float each) { cut_off[i] = each; });
  }
#pragma unroll
  for (int q = 0; q < QUADS; q++) {
    float4 v = C_CONSTANT ? make_float4(C_here, C_here, C_here, C_here) : rows[q][MATRIX];
    float Cs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int k = 4 * q + i;
      h = CUT ? cut_off[k] : fmaf(run.a[k], h, run.x[k]);
      y[k] = fmaf(h, Cs[i], y[k]);
    }
  }
  if (CUT && VARLEN) write_last_states(run, cut, last, seq, table_row);
}

// One tile, rows n0 ... n0 + STAGED of its states.
template <bool CUT>
__device__ __forceinline__ void scan_states(const Params& p, const float4* matrices, float2* running, int n0, int t,
                                            const Place& w, const Cuts& cut, bool keep, const float* delta,
                                            const float* du, float total, float* y) {
  const float4* rows[QUADS];
#pragma unroll
  for (int q = 0; q < QUADS; q++) rows[q] = matrices + place_of(q, w.j, w.part);
  Effect* effects = reinterpret_cast<Effect*>(running + EFFECTS_BEHIND - w.local * ROW_A);
  running += n0;
  const int64 at = ((int64)w.b * p.chunks + t / CHUNK) * p.channels + w.d, table_row = (int64)p.channels * N;
  float* states = KEEP ? p.states + at * N + n0 : nullptr;
  const int64 table_at = (int64)w.d * N + n0;
  const int* seq = PACKED ? p.seq + (int64)w.b * p.seqlen + t : nullptr;
#pragma unroll UNROLL
  for (int m = 0; m < STAGED; m++) {
    if (N % STAGED && n0 + m >= N) break;
    Run run;
    float B_here = B_CONSTANT ? p.B_constant[w.d * p.B_g + (n0 + m) * p.B_n] : 0.f;
    float C_here = C_CONSTANT ? p.C_constant[w.d * p.C_g + (n0 + m) * p.C_n] : 0.f;
    first_run<CUT>(run, rows, running, effects + (m & 1) * SEATS, delta, du, total, B_here, cut,
                   VARLEN && p.table, p.table + table_at + m, seq, table_row, w);
    if (keep) *states = run.h;
    second_run<CUT>(run, rows, y, C_here, cut, VARLEN && w.here ? p.last + table_at + m : nullptr, seq, table_row);
#pragma unroll
    for (int q = 0; q < QUADS; q++) rows[q] += ROW;
    running++;
    states++;
  }
}

// delta and u of a warp's next tile; z is asked for when its tile begins, and read at the end of it.
__device__ __forceinline__ void request_rows(const Params& p, float4* memory, const Place& w, const Copies& copies) {
  const Block& k = block_in(memory);
  uint4* slots = reinterpret_cast<uint4*>(memory + ROWS) + w.warp * 3 * SLOTS;
  request_tile(slots, k.delta, p.delta_d, copies);
  request_tile(slots + SLOTS, k.u, p.u_d, copies);
}

// Delta, Delta u, D u and the sum of Delta of a lane's steps.
__device__ __forceinline__ float begin_tile(const Params& p, const Place& w, int left, float* delta, float* du, float* y) {
  const float bias = p.bias ? p.bias[w.d] : 0.f, skip = p.D ? p.D[w.d] : 0.f;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < STEPS; i++) delta[i] = SOFTPLUS ? softplus(delta[i] + bias) : delta[i] + bias;
  if (left < STEPS) {
#pragma unroll
    for (int i = 0; i < STEPS; i++)
      if (i >= left) delta[i] = 0.f;  // a decay of one: the state stays
  }
#pragma unroll
  for (int i = 0; i < STEPS; i++) du[i] = delta[i] * y[i], y[i] *= skip, total += delta[i];
  return total;
}

__device__ __forceinline__ void end_tile(const Params& p, float4* memory, const Place& w, int t, int left, float* y) {
  const Block& k = block_in(memory);
  if (HAS_Z) {
    float z[STEPS];
    if (WIDE_ROWS) {
      wait_async();
      __syncwarp();
      receive_tile(reinterpret_cast<const uint4*>(memory + ROWS) + (w.warp * 3 + 2) * SLOTS, w, z);
    } else {
      load_steps(row_of(k.z, p.z_d, w.d) + steps_of(t, p.z_l), p.z_l, left, z);
    }
#pragma unroll
    for (int i = 0; i < STEPS; i++) y[i] *= z[i] * sigmoid(z[i]);
  }
  store_steps(row_of(k.y, p.y_d, w.d) + steps_of(t, p.y_l), p.y_l, left, y);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(const __grid_constant__ Params p) {
  extern __shared__ float4 memory[];
  take_turn();
  find_block(p, 0, memory);
  const Block& k = block_in(memory);
  float2* running = reinterpret_cast<float2*>(memory + RUNNING);
  if (WIDE_ROWS) {
    const Place w = find_place(p, k);
    request_rows(p, memory, w, find_copies(k.begin, w, p.seqlen));
  }
  request_matrices(p, memory, k, 0, k.begin);
  for (int i = threadIdx.x; i < BLOCK_D * N; i += THREADS) {
    const int64 d = min(k.d_block + i / N, p.channels - 1), n = i % N;
    const float h = p.enter ? p.enter[(((int64)k.b * p.stretches + k.stretch) * p.channels + d) * N + n] : 0.f;
    running[i / N * ROW_A + n] = make_float2(p.A[d * p.A_d + n * p.A_n] * LOG2E, h);
  }
  int buffer = 0;
  Starts starts = {-1, 0, false};
#pragma unroll 1
  for (int t0 = k.begin; t0 < k.end; t0 += BLOCK_L) {
    float delta[STEPS], du[STEPS], y[STEPS], total;
    const bool more = t0 + BLOCK_L < k.end;
    if (PACKED) find_starts(starts, p, k.begin, t0, find_place(p, k));
#pragma unroll 1
    for (int n0 = 0; n0 < N; n0 += STAGED) {
      const Place w = find_place(p, k);
      const int tile = t0 + w.part * TILE, t = tile + w.j * STEPS, left = w.here ? p.seqlen - t : 0;
      float4* matrices = memory + MATRICES + buffer * 2 * MATRIX;
      buffer ^= 1;
      wait_async();
      convert_matrices(p, memory, matrices, k, n0, t0);
      __syncwarp();
      if (n0 == 0) {
        if (WIDE_ROWS) {
          const uint4* slots = reinterpret_cast<const uint4*>(memory + ROWS) + w.warp * 3 * SLOTS;
          receive_tile(slots, w, delta);
          receive_tile(slots + SLOTS, w, y);
        } else {
          load_steps(row_of(k.delta, p.delta_d, w.d) + steps_of(t, p.delta_l), p.delta_l, left, delta);
          load_steps(row_of(k.u, p.u_d, w.d) + steps_of(t, p.u_l), p.u_l, left, y);
        }
        __syncwarp();
      }
      if (n0 + STAGED < N) request_matrices(p, memory, k, n0 + STAGED, t0);
      else if (more) request_matrices(p, memory, k, 0, t0 + BLOCK_L);
      if (n0 == 0) {
        if (WIDE_ROWS) {
          Copies copies = find_copies(t0, w, p.seqlen);
          if (HAS_Z) request_tile(reinterpret_cast<uint4*>(memory + ROWS) + (w.warp * 3 + 2) * SLOTS, k.z, p.z_d, copies);
          to_next_tile(copies, p.seqlen);
          if (more) request_rows(p, memory, w, copies);
        }
        total = begin_tile(p, w, left, delta, du, y);
      }
      __syncthreads();
      const Cuts cut = PACKED ? find_cuts(starts, k.begin, tile, p.seqlen, w) : Cuts{};
      if (PACKED && n0 == 0 && cut.any && !(VARLEN && p.table)) {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
          if (cut.starts >> i & 1) delta[i] = FAR;
      }
      const bool keep = KEEP && t % CHUNK == 0 && left > 0;
      if (PACKED && cut.any) scan_states<true>(p, matrices, running + w.local * ROW_A, n0, t, w, cut, keep, delta, du, total, y);
      else scan_states<false>(p, matrices, running + w.local * ROW_A, n0, t, w, cut, keep, delta, du, total, y);
    }
    const Place w = find_place(p, k);
    const int t = t0 + w.part * TILE + w.j * STEPS;
    end_tile(p, memory, w, t, w.here ? p.seqlen - t : 0, y);
  }
  if (ALONG > 1) __syncthreads();
  else __syncwarp();
  const Place w = find_place(p, k);
  if (!VARLEN && w.here && w.part == 0 && k.end == p.seqlen)
    for (int n = w.j; n < N; n += LANES)
      p.last[((int64)w.b * p.channels + w.d) * N + n] = running[w.local * ROW_A + n].y;
}
