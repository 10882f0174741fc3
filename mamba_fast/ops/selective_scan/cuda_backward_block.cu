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

// Delta, Delta u, D u and the sum of Delta; returns what the steps give to dD.
__device__ __forceinline__ float begin_tile(const Params& p, const Place& w, Steps& s, int left) {
  const float bias = p.bias ? p.bias[w.d] : 0.f, skip = p.D ? p.D[w.d] : 0.f;
  float dD = 0.f;
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
  return dD;
}

// What a block has gathered over its tokens: sums over tokens for each channel, the flow before the first token.
__device__ __forceinline__ void finish_block(const Params& p, const Block& k, const float4* memory) {
  const Place w = find_place(p, k);
  const float* numbers = reinterpret_cast<const float*>(memory);
  const float4* running = memory + RUNNING + w.local * ROW_A;
  const int64 row = (int64)p.channels * N, slot = ORDERED ? k.b * p.stretches + k.stretch : 0;
  auto add = [&](float* to, float v) {
    if (ORDERED) *to = v;
    else atomicAdd(to, v);
  };
  __syncwarp();
  if (!w.here) return;
  if (w.j == 0 && p.D) add(p.dD + slot * p.channels + w.d, numbers[SUMS + 2 * w.local]);
  if (w.j == 0 && p.bias) add(p.dbias + slot * p.channels + w.d, numbers[SUMS + 2 * w.local + 1]);
  for (int n = w.j; n < N; n += LANES) {
    const int64 at = (int64)w.d * N + n;
    add(p.dA + slot * row + at, running[n].w);
    if (B_CONSTANT) add(p.dB + slot * row + at, numbers[CONSTANTS + 2 * (w.local * N + n)]);
    if (C_CONSTANT) add(p.dC + slot * row + at, numbers[CONSTANTS + 2 * (w.local * N + n) + 1]);
    if (!VARLEN && p.dfirst && k.stretch == 0) p.dfirst[k.b * row + at] = running[n].z;
  }
}

// Rows n0 ... n0 + STAGED of a tile, one after another; dB and dC of each to global memory.
template <bool CUT>
__device__ __forceinline__ void walk_states(const Params& p, float4* memory, const Block& k, const Place& w, const Cuts& cut,
                                            Steps& steps, const float4* matrices, int n0, int t0, int& phase, float& dA, bool fresh) {
  const Share share = find_share(p, memory, k, ORDERED ? blockIdx.x % p.blocks : 0);
  const int* seq = PACKED ? p.seq + (int64)w.b * p.seqlen + t0 + w.j * STEPS : nullptr;
  const bool adds = share.here && t0 + share.t < p.seqlen;
  const float4* rows[QUADS];
#pragma unroll
  for (int q = 0; q < QUADS; q++) rows[q] = matrices + place_of(q, w.j);
  float4* running = memory + RUNNING + w.local * ROW_A + n0;
  float4* part = memory + ALL_PARTS + w.warp * PART + w.lane;
  float* constants = reinterpret_cast<float*>(memory) + CONSTANTS + 2 * (w.local * N + n0);
  float* to = share.to + (int64)n0 * p.padded + t0;
#pragma unroll UNROLL
  for (int m = 0; m < STAGED; m++) {
    if (N % STAGED && n0 + m >= N) break;
    one_state<CUT>(p, w, cut, steps, running, rows, n0 + m, part + phase, constants, seq, dA);
    if (!B_CONSTANT || !C_CONSTANT) {
      __syncthreads();
      if (adds) add_matrices(share.from + phase, share.turn, to, fresh);
      phase ^= WARPS * PART;
    }
#pragma unroll
    for (int q = 0; q < QUADS; q++) rows[q] += ROW;
    running++;
    constants += 2;
    to += p.padded;
  }
}

__device__ __forceinline__ void walk(const Params& p, float4* memory, int pass) {
  find_block(p, pass, memory);
  const Block& k = block_in(memory);
  float* numbers = reinterpret_cast<float*>(memory);
  int t0 = k.begin + (k.end - k.begin - 1) / TILE * TILE, buffer = 0, phase = 0;
  {
    const Place w = find_place(p, k);
    request_inputs(p, w, reinterpret_cast<uint4*>(memory + ROWS) + w.warp * TENSORS * SLOTS, t0);
    request_matrices(p, memory, k, 0, t0);
    request_states(p, w, numbers + ENTERING, t0);
  }
  for (int i = threadIdx.x; i < BLOCK_D * N; i += THREADS) {
    const int64 d = min(k.d_block + i / N, p.channels - 1), n = i % N;
    const float flow = p.leave ? p.leave[(((int64)k.b * p.stretches + k.stretch) * p.channels + d) * N + n] : 0.f;
    memory[RUNNING + i / N * ROW_A + n] = make_float4(p.A[d * p.A_d + n * p.A_n], 0.f, flow, 0.f);
    if (B_CONSTANT || C_CONSTANT) numbers[CONSTANTS + 2 * i] = numbers[CONSTANTS + 2 * i + 1] = 0.f;
  }
  for (int i = threadIdx.x; i < 2 * BLOCK_D; i += THREADS) numbers[SUMS + i] = 0.f;
  __syncthreads();
#pragma unroll 1
  for (; t0 >= k.begin; t0 -= TILE) {
    Steps steps;
    float dA = 0.f;  // of the last state that was done
#pragma unroll 1
    for (int n0 = 0; n0 < N; n0 += STAGED) {
      const Place w = find_place(p, k);
      const int t = t0 + w.j * STEPS, left = w.here ? p.seqlen - t : 0;
      float4* matrices = memory + MATRICES + buffer * 2 * MATRIX;
      buffer ^= 1;
      wait_async();
      convert_matrices(p, memory, matrices, k, n0, t0);
      __syncwarp();
      if (n0 == 0) {
        receive_inputs(p, w, reinterpret_cast<const uint4*>(memory + ROWS) + w.warp * TENSORS * SLOTS, t, left, steps);
        for (int n = w.j; n < N; n += LANES) memory[RUNNING + w.local * ROW_A + n].y = numbers[ENTERING + w.local * N + n];
        __syncwarp();
      }
      if (n0 + STAGED < N) request_matrices(p, memory, k, n0 + STAGED, t0);
      else if (t0 > k.begin) request_matrices(p, memory, k, 0, t0 - TILE);
      if (n0 == 0) {
        // Once more, for the end of the tile.
        request_inputs(p, w, reinterpret_cast<uint4*>(memory + ROWS) + w.warp * TENSORS * SLOTS, t0);
        if (t0 > k.begin) request_states(p, w, numbers + ENTERING, t0 - TILE);
        const float dD = sum_lanes(begin_tile(p, w, steps, left));
        if (w.j == 0) numbers[SUMS + 2 * w.local] += dD;
      }
      __syncthreads();
      const Cuts cut = PACKED ? find_cuts(p.seq + (int64)w.b * p.seqlen, t0, p.seqlen, w) : Cuts{};
      const bool fresh = pass == 0 && ORDERED == 1;
      if (PACKED && cut.any) walk_states<true>(p, memory, k, w, cut, steps, matrices, n0, t0, phase, dA, fresh);
      else walk_states<false>(p, memory, k, w, cut, steps, matrices, n0, t0, phase, dA, fresh);
    }
    wait_async();
    __syncwarp();
    const Place w = find_place(p, k);
    const int t = t0 + w.j * STEPS;
    dA = sum_lanes(dA);
    if (w.j == 0) memory[RUNNING + w.local * ROW_A + N - 1].w += dA;
    uint4* slots = reinterpret_cast<uint4*>(memory + ROWS) + w.warp * TENSORS * SLOTS;
    const float dbias = sum_lanes(finish_tile(p, w, steps, slots, t, w.here ? p.seqlen - t : 0));
    if (w.j == 0) numbers[SUMS + 2 * w.local + 1] += dbias;
    __syncwarp();
    if (t0 > k.begin) request_inputs(p, w, slots, t0 - TILE);
  }
  finish_block(p, k, memory);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const __grid_constant__ Params p) {
  extern __shared__ float4 memory[];
#pragma unroll 1
  for (int pass = 0; pass < p.passes; pass++) walk(p, memory, pass);
}
