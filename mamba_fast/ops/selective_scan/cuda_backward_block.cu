// The walk of a block over its tiles.

// Does the warp's tile of the block's, which begin with token t0, hold a token?
__device__ __forceinline__ bool has_tokens(const Params& p, const Place& w, int t0) {
  return ALONG == 1 || t0 + w.part * TILE < p.seqlen;
}

__device__ __forceinline__ void request_states(const Params& p, const Place& w, float* entering, int t0) {
  constexpr int AT_ONCE = N % 4 ? 1 : 4;
  if (!has_tokens(p, w, t0)) return;
  const float* from = p.states + (((int64)w.b * p.chunks + (t0 + w.part * TILE) / CHUNK) * p.channels + w.d) * N;
#pragma unroll 1
  for (int n = w.j * AT_ONCE; n < N; n += LANES * AT_ONCE) {
    if (N % 4) copy_async_word(entering + w.seat * N + n, from + n);
    else copy_async(entering + w.seat * N + n, from + n, 16);
  }
}

__device__ __forceinline__ uint4* slots_of(float4* memory, const Place& w, int buffer) {
  return reinterpret_cast<uint4*>(memory + ROWS) + buffer * ALL_SLOTS + w.warp * TENSORS * SLOTS;
}

__device__ __forceinline__ void request_inputs(const Params& p, const Block& k, const Place& w, uint4* slots, int t0) {
  if (!WIDE_ROWS) return;
  const Copies copies = find_copies(t0, w, p.seqlen);
  request_tile(slots, k.delta, p.delta_d, copies);
  request_tile(slots + SLOTS, k.u, p.u_d, copies);
  request_tile(slots + 2 * SLOTS, k.dy, p.dy_d, copies);
  if (HAS_Z) request_tile(slots + 3 * SLOTS, k.z, p.z_d, copies);
}

// u into s.y, dy times the gate, and the raw delta.
__device__ __forceinline__ void receive_inputs(const Params& p, const Block& k, const Place& w, const uint4* slots, int t, int left, Steps& s) {
  if (WIDE_ROWS) {
    receive_tile(slots, w, s.delta);
    receive_tile(slots + SLOTS, w, s.y);
    receive_tile(slots + 2 * SLOTS, w, s.dy);
    if (HAS_Z) receive_tile(slots + 3 * SLOTS, w, s.gB);
  } else {
    load_steps(row_of(k.delta, p.delta_d, w.d) + steps_of(t, p.delta_l), p.delta_l, left, s.delta);
    load_steps(row_of(k.u, p.u_d, w.d) + steps_of(t, p.u_l), p.u_l, left, s.y);
    load_steps(row_of(k.dy, p.dy_d, w.d) + steps_of(t, p.dy_l), p.dy_l, left, s.dy);
    if (HAS_Z) load_steps(row_of(k.z, p.z_d, w.d) + steps_of(t, p.z_l), p.z_l, left, s.gB);
  }
  if (HAS_Z) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) s.dy[i] *= s.gB[i] * sigmoid(s.gB[i]);
  }
}

// Delta log2 e, Delta u, D u and the sum of the first; returns what the steps give to dD.
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
    s.delta[i] *= LOG2E;
    dD = fmaf(s.dy[i], s.y[i], dD);
    s.y[i] *= skip;
    s.total += s.delta[i];
    s.gB[i] = s.ddelta[i] = 0;
  }
  return dD;
}

// A lane's place for dA of state n, or its channel's.
__device__ __forceinline__ float* dA_place(float4* memory, const Place& w, int n) {
  return reinterpret_cast<float*>(memory) + ALL_DA + n * SHARES * SEATS + (SHARES > 1 ? w.warp * 32 + w.lane : w.seat);
}

// dD and ddelta_bias of a lane's channel.
__device__ __forceinline__ Sum* sums_of(float4* memory, const Place& w) {
  return reinterpret_cast<Sum*>(reinterpret_cast<float*>(memory) + SUMS) + 2 * w.seat;
}

// What a block has gathered over its tokens: sums over tokens for each channel, the flow before the first token.
__device__ __forceinline__ void finish_block(const Params& p, const Block& k, float4* memory, int parity) {
  const Place w = find_place(p, k);
  const float* numbers = reinterpret_cast<const float*>(memory);
  const float4* running = memory + RUNNING + w.seat * ROW_A;
  const int64 row = (int64)p.channels * N, slot = ORDERED ? k.b * p.stretches + k.stretch : 0;
  auto add = [&](float* to, float v) {
    if (ORDERED) *to = v;
    else atomicAdd(to, v);
  };
  __syncwarp();
  if (!w.here) return;
  if (w.j == 0 && p.D) add(p.dD + slot * p.channels + w.d, sums_of(memory, w)[0].total);
  if (w.j == 0 && p.bias) add(p.dbias + slot * p.channels + w.d, sums_of(memory, w)[1].total);
  for (int n = w.j; n < N; n += LANES) {
    const int64 at = (int64)w.d * N + n;
    const float* dA = dA_place(memory, w, n) - (SHARES > 1 ? w.j * CHANNELS : 0);
    float sum = 0.f;
    for (int j = 0; j < SHARES; j++) sum += dA[j * CHANNELS];
    add(p.dA + slot * row + at, sum * LN2);
    if (B_CONSTANT) add(p.dB + slot * row + at, numbers[CONSTANTS + 2 * (w.seat * N + n)]);
    if (C_CONSTANT) add(p.dC + slot * row + at, numbers[CONSTANTS + 2 * (w.seat * N + n) + 1]);
    if (!VARLEN && p.dfirst && k.stretch == 0 && w.part == 0) p.dfirst[k.b * row + at] = parity ? running[n].w : running[n].z;
  }
}

// Rows n0 ... n0 + STAGED of a tile, one state after another; dB and dC of each to global memory.
template <bool CUT>
__device__ __forceinline__ void walk_states(const Params& p, float4* memory, const Block& k, const Place& w, const Cuts& cut,
                                            Steps& steps, const float4* matrices, int n0, int t0, int& phase, int parity, bool fresh) {
  const int tile = t0 + w.part * TILE;
  const int* seq = PACKED ? p.seq + (int64)w.b * p.seqlen + tile + w.j * STEPS : nullptr;
  const float4* rows[QUADS];
#pragma unroll
  for (int q = 0; q < QUADS; q++) rows[q] = matrices + place_of(q, w.j, w.part);
  float4* running = memory + RUNNING + w.seat * ROW_A + n0;
  float* constants = reinterpret_cast<float*>(memory) + CONSTANTS + 2 * (w.seat * N + n0);
  Effect* effects = reinterpret_cast<Effect*>(reinterpret_cast<float*>(memory) + EFFECTS);
  float* dA = dA_place(memory, w, n0);
  const Ones ones = read_ones(memory, w.lane);
  Target target = find_target(p, k, n0, tile + 2 * w.lane);
#pragma unroll UNROLL
  for (int m = 0; m < STAGED; m++) {
    if (N % STAGED && n0 + m >= N) break;
    const float4 sum = one_state<CUT>(p, w, cut, steps, running, rows, ones, n0 + m, dA, constants,
                                       effects + (m & 1) * SEATS, seq, parity);
#pragma unroll
    for (int q = 0; q < QUADS; q++) rows[q] += ROW;
    running++;
    dA += SHARES * SEATS;
    constants += 2;
    if (B_CONSTANT && C_CONSTANT) continue;
    if (!ORDERED) {
      if (has_tokens(p, w, t0)) add_matrices(target, sum, fresh);
      target.dB += p.padded, target.dC += p.padded;
    } else {
      float4* parts = memory + ALL_PARTS + phase * PARTS_OF_A_GROUP;
      const int g = m % GROUP;
      parts[(w.warp * GROUP + g) * 32 + w.lane] = sum;
      if (g < GROUP - 1 && m + 1 < STAGED && n0 + m + 1 < N) continue;
      __syncthreads();
      add_group(p, k, parts, n0 + m - g, g + 1, t0, fresh);
      phase ^= 1;
    }
  }
}

__device__ __forceinline__ void walk(const Params& p, float4* memory, int pass) {
  find_block(p, pass, memory);
  const Block& k = block_in(memory);
  float* numbers = reinterpret_cast<float*>(memory);
  float4* const matrices = memory + MATRICES;
  int t0 = k.begin + (k.end - k.begin - 1) / BLOCK_L * BLOCK_L, phase = 0, parity = 0;
  {
    const Place w = find_place(p, k);
    request_inputs(p, k, w, slots_of(memory, w, 0), t0);
    request_matrices(p, memory, k, 0, t0);
    request_states(p, w, numbers + ENTERING, t0);
  }
  for (int i = threadIdx.x; i < SEATS * N; i += THREADS) {
    const int local = i / N / (ALONG * CHANNELS) * CHANNELS + i / N % CHANNELS;
    const int64 d = min(k.d_block + local, p.channels - 1), n = i % N;
    const float flow = p.leave ? p.leave[(((int64)k.b * p.stretches + k.stretch) * p.channels + d) * N + n] : 0.f;
    memory[RUNNING + i / N * ROW_A + n] = make_float4(p.A[d * p.A_d + n * p.A_n], 0.f, flow, 0.f);
    if (B_CONSTANT || C_CONSTANT) numbers[CONSTANTS + 2 * i] = numbers[CONSTANTS + 2 * i + 1] = 0.f;
  }
  for (int i = ALL_DA + threadIdx.x; i < CONSTANTS; i += THREADS) numbers[i] = 0.f;
  if (threadIdx.x < 32) write_ones(memory, threadIdx.x);
  __syncthreads();
  Starts starts = {-1, 0, false};
#pragma unroll 1
  for (; t0 >= k.begin; t0 -= BLOCK_L) {
    Steps steps;
    if (PACKED) find_starts(starts, p, k.begin, t0, find_place(p, k));
#pragma unroll 1
    for (int n0 = 0; n0 < N; n0 += STAGED) {
      const Place w = find_place(p, k);
      const int tile = t0 + w.part * TILE, t = tile + w.j * STEPS, left = w.here ? p.seqlen - t : 0;
      wait_async();
      __syncthreads();  // no warp still reads what is overwritten now
      convert_matrices(p, memory, matrices, k, n0, t0);
      __syncwarp();
      if (n0 == 0) {
        receive_inputs(p, k, w, slots_of(memory, w, parity), t, left, steps);
        const bool entered = has_tokens(p, w, t0);
        for (int n = w.j; n < N; n += LANES)
          memory[RUNNING + w.seat * ROW_A + n].y = entered ? numbers[ENTERING + w.seat * N + n] : 0.f;
        __syncwarp();
      }
      if (n0 + STAGED < N) request_matrices(p, memory, k, n0 + STAGED, t0);
      else if (t0 > k.begin) request_matrices(p, memory, k, 0, t0 - BLOCK_L);
      if (n0 == 0) {
        if (t0 > k.begin) {
          request_inputs(p, k, w, slots_of(memory, w, parity ^ 1), t0 - BLOCK_L);
          request_states(p, w, numbers + ENTERING, t0 - BLOCK_L);
        }
        const float dD = sum_lanes(begin_tile(p, w, steps, left));
        if (w.j == 0) add_exactly(sums_of(memory, w)[0], dD);
      }
      __syncthreads();
      const Cuts cut = PACKED ? find_cuts(starts, k.begin, tile, p.seqlen, w) : Cuts{};
      const bool fresh = pass == 0 && ORDERED == 1;
      if (PACKED && cut.any) walk_states<true>(p, memory, k, w, cut, steps, matrices, n0, t0, phase, parity, fresh);
      else walk_states<false>(p, memory, k, w, cut, steps, matrices, n0, t0, phase, parity, fresh);
    }
    const Place w = find_place(p, k);
    const int t = t0 + w.part * TILE + w.j * STEPS, left = w.here ? p.seqlen - t : 0;
    const float dbias = sum_lanes(finish_tile(p, k, w, steps, slots_of(memory, w, parity), t, left));
    if (w.j == 0) add_exactly(sums_of(memory, w)[1], dbias);
    parity ^= 1;
  }
  finish_block(p, k, memory, parity);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const __grid_constant__ Params p) {
  extern __shared__ float4 memory[];
  take_turn();
#pragma unroll 1
  for (int pass = 0; pass < p.passes; pass++) walk(p, memory, pass);
}
