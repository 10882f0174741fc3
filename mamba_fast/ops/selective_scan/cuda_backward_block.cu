// The walk of a block over its tiles.

__device__ __forceinline__ void request_states(const Params& p, const Place& w, float* entering, int t0) {
  const float* from = p.states + (((int64)w.b * p.chunks + t0 / CHUNK) * p.channels + w.d) * N;
  for (int n = w.j; n < N; n += LANES) copy_async_word(entering + w.local * N + n, from + n);
}

__device__ __forceinline__ void request_inputs(const Params& p, const Place& w, uint4* slots, int t0) {
  if (!WIDE_ROWS) return;
  request_tile(slots, p.delta, p.delta_b, p.delta_d, t0, w, p.seqlen);
  request_tile(slots + SLOTS, p.u, p.u_b, p.u_d, t0, w, p.seqlen);
  request_tile(slots + 2 * SLOTS, p.dy, p.dy_b, p.dy_d, t0, w, p.seqlen);
  if (HAS_Z) request_tile(slots + 3 * SLOTS, p.z, p.z_b, p.z_d, t0, w, p.seqlen);
}

// u into s.y, dy times the gate, and the raw delta.
__device__ __forceinline__ void receive_inputs(const Params& p, const Place& w, const uint4* slots, int t, int left, Steps& s) {
  if (WIDE_ROWS) {
    receive_tile(slots, w, s.delta);
    receive_tile(slots + SLOTS, w, s.y);
    receive_tile(slots + 2 * SLOTS, w, s.dy);
    if (HAS_Z) receive_tile(slots + 3 * SLOTS, w, s.gB);
  } else {
    load_steps(row_of(p.delta, p.delta_b, p.delta_d, w.b, w.d) + steps_of(t, p.delta_l), p.delta_l, left, s.delta);
    load_steps(row_of(p.u, p.u_b, p.u_d, w.b, w.d) + steps_of(t, p.u_l), p.u_l, left, s.y);
    load_steps(row_of(p.dy, p.dy_b, p.dy_d, w.b, w.d) + steps_of(t, p.dy_l), p.dy_l, left, s.dy);
    if (HAS_Z) load_steps(row_of(p.z, p.z_b, p.z_d, w.b, w.d) + steps_of(t, p.z_l), p.z_l, left, s.gB);
  }
  if (HAS_Z) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) s.dy[i] *= s.gB[i] * sigmoid(s.gB[i]);
  }
}

__device__ __forceinline__ void begin_tile(Steps& s, int left, float bias, float skip, float& dD) {
  s.total = 0;
#pragma unroll
  for (int i = 0; i < STEPS; i++) s.delta[i] = SOFTPLUS ? softplus(s.delta[i] + bias) : s.delta[i] + bias;
  if (left < STEPS) {
#pragma unroll
    for (int i = 0; i < STEPS; i++)
      if (i >= left) s.delta[i] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    s.du[i] = s.delta[i] * s.y[i];
    dD = fmaf(s.dy[i], s.y[i], dD);
    s.y[i] *= skip;
    s.total += s.delta[i];
    s.gB[i] = s.ddelta[i] = 0;
  }
}

// What a block has gathered over its tokens: sums over tokens for each channel, the flow before the first token.
__device__ __forceinline__ void finish_block(const Params& p, const Place& w, const float4* running, const float* constants,
                                             float dD, float dbias) {
  const int64 row = (int64)p.channels * N, slot = ORDERED ? w.b * p.stretches + w.stretch : 0;
  auto add = [&](float* to, float v) {
    if (ORDERED) *to = v;
    else atomicAdd(to, v);
  };
  dD = sum_lanes(dD);
  dbias = sum_lanes(dbias);
  __syncwarp();
  if (!w.here) return;
  if (w.j == 0 && p.D) add(p.dD + slot * p.channels + w.d, dD);
  if (w.j == 0 && p.bias) add(p.dbias + slot * p.channels + w.d, dbias);
  for (int n = w.j; n < N; n += LANES) {
    const int64 at = (int64)w.d * N + n;
    add(p.dA + slot * row + at, running[n].w);
    if (B_CONSTANT) add(p.dB + slot * row + at, constants[2 * n]);
    if (C_CONSTANT) add(p.dC + slot * row + at, constants[2 * n + 1]);
    if (!VARLEN && w.stretch == 0) p.dfirst[w.b * row + at] = running[n].z;
  }
}

__device__ __forceinline__ void walk(const Params& p, float4* memory, int pass) {
  const Place w = find_place(p, blockIdx.x, pass);
  const Memory s = lay_out(memory, w.warp);
  const int seqlen = p.seqlen, begin = w.stretch * p.stretch, end = min(begin + p.stretch, seqlen);
  const io_t* B = B_CONSTANT ? nullptr : p.B + w.b * p.B_b + min(w.d_block, p.channels - 1) / p.B_span * p.B_g;
  const io_t* C = C_CONSTANT ? nullptr : p.C + w.b * p.C_b + min(w.d_block, p.channels - 1) / p.C_span * p.C_g;
  auto request_matrices = [&](int n0, int t0) {
    if (!B_CONSTANT && WIDE_B) request_matrix(s.raw_B, B, p.B_n, n0, t0, seqlen);
    if (!C_CONSTANT && WIDE_C) request_matrix(s.raw_C, C, p.C_n, n0, t0, seqlen);
  };
  int t0 = begin + (end - begin - 1) / TILE * TILE, buffer = 0, phase = 0;
  request_inputs(p, w, s.slots, t0);
  request_matrices(0, t0);
  request_states(p, w, s.entering, t0);
  for (int k = threadIdx.x; k < BLOCK_D * N; k += THREADS) {
    int64 d = min(w.d_block + k / N, p.channels - 1), n = k % N;
    float flow = p.leave ? p.leave[(((int64)w.b * p.stretches + w.stretch) * p.channels + d) * N + n] : 0.f;
    s.running[k / N * ROW_A + n] = make_float4(p.A[d * p.A_d + n * p.A_n], 0.f, flow, 0.f);
    if (B_CONSTANT || C_CONSTANT) s.constants[2 * k] = s.constants[2 * k + 1] = 0.f;
  }
  __syncthreads();
  const float bias = p.bias ? p.bias[w.d] : 0.f, skip = p.D ? p.D[w.d] : 0.f;
  const Share share = find_share(p, w, s.parts, ORDERED ? blockIdx.x % p.blocks : 0);
  float dD = 0.f, dbias = 0.f;
  float4* running = s.running + w.local * ROW_A;
  float* constants = s.constants + 2 * w.local * N;
#pragma unroll 1
  for (; t0 >= begin; t0 -= TILE) {
    Steps steps;
    const int t = t0 + w.j * STEPS, left = w.here ? seqlen - t : 0;
    const Cuts cut = PACKED ? find_cuts(p.seq + (int64)w.b * seqlen, t, seqlen, w) : Cuts{};
    const int* seq = PACKED ? p.seq + (int64)w.b * seqlen + t : nullptr;
#pragma unroll 1
    for (int n0 = 0; n0 < N; n0 += STAGED) {
      float4* matrices = s.matrices + buffer * 2 * MATRIX;
      buffer ^= 1;
      wait_async();
      if (!B_CONSTANT) convert_matrix<WIDE_B>(matrices, s.raw_B, B, p.B_n, p.B_l, n0, t0, seqlen);
      if (!C_CONSTANT) convert_matrix<WIDE_C>(matrices + MATRIX, s.raw_C, C, p.C_n, p.C_l, n0, t0, seqlen);
      __syncwarp();
      if (n0 == 0) {
        receive_inputs(p, w, s.slots, t, left, steps);
        for (int n = w.j; n < N; n += LANES) running[n].y = s.entering[w.local * N + n];
        __syncwarp();
      }
      if (n0 + STAGED < N) request_matrices(n0 + STAGED, t0);
      else if (t0 > begin) request_matrices(0, t0 - TILE);
      if (n0 == 0) {
        request_inputs(p, w, s.slots, t0);  // once more, for the end of the tile
        if (t0 > begin) request_states(p, w, s.entering, t0 - TILE);
        begin_tile(steps, left, bias, skip, dD);
      }
      __syncthreads();
      const float4* rows[QUADS];
#pragma unroll
      for (int q = 0; q < QUADS; q++) rows[q] = matrices + place_of(q, w.j);
#pragma unroll UNROLL
      for (int m = 0; m < STAGED; m++) {
        const int n = n0 + m;
        if (N % STAGED && n >= N) break;
        float4* part = s.parts + phase + w.warp * PART + w.lane;
        if (PACKED && cut.any) one_state<true>(p, w, cut, steps, running + n, rows, m, n, part, constants + 2 * n, seq);
        else one_state<false>(p, w, cut, steps, running + n, rows, m, n, part, constants + 2 * n, seq);
        if (!B_CONSTANT || !C_CONSTANT) {
          __syncthreads();
          add_matrices(p, share, phase, n, t0, pass == 0 && ORDERED == 1);
          phase ^= WARPS * PART;
        }
      }
    }
    wait_async();
    __syncwarp();
    finish_tile(p, w, steps, s.slots, t, left, bias, skip, dbias);
    __syncwarp();
    if (t0 > begin) request_inputs(p, w, s.slots, t0 - TILE);
  }
  finish_block(p, w, running, constants, dD, dbias);
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const __grid_constant__ Params p) {
  extern __shared__ float4 memory[];
#pragma unroll 1
  for (int pass = 0; pass < p.passes; pass++) walk(p, memory, pass);
}
