// What each stretch of tokens alone hands to its neighbour, and the chain of these along the sequence: so that the
// stretches of one sequence can be scanned at the same time.

#ifdef CHAIN
// enter (B, S, D, N): what enters each stretch, H_{k+1} = exp(A sum Delta) H_k + local_k; along the tokens, or against
// them with REVERSE. A total of NaN says that a packed sequence starts in the stretch: nothing passes.
extern "C" __global__ void __launch_bounds__(128) scan_chain(const __grid_constant__ Params p) {
  take_turn();
  int64 k = (int64)blockIdx.x * 128 + threadIdx.x, row = (int64)p.channels * N;
  if (k >= p.batch * row) return;
  int64 b = k / row, d = k % row / N, n = k % N;
  float A2 = p.A[d * p.A_d + n * p.A_n] * LOG2E;
  const float* edge = REVERSE ? (VARLEN ? nullptr : p.dlast) : (VARLEN ? nullptr : p.table);
  float h = edge ? edge[k] : 0.f;
  float* enter = REVERSE ? p.dtable : p.states;
  for (int i = 0; i < p.stretches; i++) {
    int s = REVERSE ? p.stretches - 1 - i : i;
    int64 at = b * p.stretches + s;
    enter[at * row + k % row] = h;
    float total = p.total[at * p.channels + d], local = p.local[at * row + k % row];
    h = total == total ? fmaf(ex2(A2 * total), h, local) : local;
  }
}
#else

// Forward: the end state of a stretch from zero. REVERSE: A_bar g at its start from zero flow, x = dy and M = C.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_summary(const __grid_constant__ Params p) {
  extern __shared__ float4 memory[];
  take_turn();
  find_block(p, 0, memory);
  const Block& block = block_in(memory);
  const Place w = find_place(p, block);
  float4* matrix = memory + BLOCK_SIZE;
  uint4* raw = reinterpret_cast<uint4*>(matrix + MATRIX);
  float2* running = reinterpret_cast<float2*>(raw + RAW) + w.local * ROW_A;  // (A log2 e, running value)
  const int seqlen = p.seqlen, begin = block.begin, end = block.end;
  constexpr bool M_CONSTANT = REVERSE ? C_CONSTANT : B_CONSTANT, WIDE_M = REVERSE ? WIDE_C : WIDE_B;
  const int64 M_n = REVERSE ? p.C_n : p.B_n, M_l = REVERSE ? p.C_l : p.B_l;
  const io_t* M = M_CONSTANT ? nullptr
                  : REVERSE  ? block.C
                             : block.B;
  for (int n = w.j; n < N; n += LANES) running[n] = make_float2(p.A[w.d * p.A_d + n * p.A_n] * LOG2E, 0.f);
  const float bias = p.bias ? p.bias[w.d] : 0.f;
  float sum = 0.f;
  bool cut_off = false;
  Starts starts = {-1, 0, false};
  const int tiles = (end - begin + TILE - 1) / TILE;
  auto first_of = [&](int i) { return begin + (REVERSE ? tiles - 1 - i : i) * TILE; };
  auto request = [&](int n0, int i) {
    if (!M_CONSTANT && WIDE_M && i < tiles) request_matrix(raw, M, M_n, n0, first_of(i), seqlen);
  };
  request(0, 0);
#pragma unroll 1
  for (int i = 0; i < tiles; i++) {
    const int t0 = first_of(i), t = t0 + w.j * STEPS, left = w.here ? seqlen - t : 0;
    float delta[STEPS], x[STEPS], total = 0;
    if (PACKED) find_starts(starts, p, begin, t0, w);
    const Cuts cut = PACKED ? find_cuts(starts, begin, t0, seqlen, w) : Cuts{};
    load_row(row_of(block.delta, p.delta_d, w.d) + steps_of(t, p.delta_l), p.delta_l, left, delta);
    if (REVERSE) load_row(row_of(block.dy, p.dy_d, w.d) + steps_of(t, p.dy_l), p.dy_l, left, x);
    else load_row(row_of(block.u, p.u_d, w.d) + steps_of(t, p.u_l), p.u_l, left, x);
    if (REVERSE && HAS_Z) {
      float z[STEPS];
      load_row(row_of(block.z, p.z_d, w.d) + steps_of(t, p.z_l), p.z_l, left, z);
#pragma unroll
      for (int k = 0; k < STEPS; k++) x[k] *= z[k] * sigmoid(z[k]);
    }
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      delta[k] = SOFTPLUS ? softplus(delta[k] + bias) : delta[k] + bias;
      if (k >= left) delta[k] = 0.f;
      if (!REVERSE) x[k] *= delta[k];
      total += delta[k];
    }
    sum += total;
    if (PACKED && __any_sync(~0u, cut.starts != 0)) cut_off = true;
#pragma unroll 1
    for (int n0 = 0; n0 < N; n0 += STAGED) {
      wait_async();
      __syncthreads();
      if (!M_CONSTANT) convert_matrix<WIDE_M>(matrix, raw, M, M_n, M_l, n0, t0, seqlen);
      if (n0 + STAGED < N) request(n0 + STAGED, i);
      else request(0, i + 1);
      __syncthreads();
      for (int m = 0; m < min(STAGED, N - n0); m++) {
        const int n = n0 + m;
        const int64 at = (int64)w.d * N + n, row = (int64)p.channels * N;
        float A2 = running[n].x, decay = ex2(A2 * total), f = w.j == (REVERSE ? LANES - 1 : 0) ? running[n].y : 0.f;
        float constant = M_CONSTANT ? (REVERSE ? p.C_constant[w.d * p.C_g + n * M_n] : p.B_constant[w.d * p.B_g + n * M_n]) : 0.f;
        const int* seq = PACKED ? p.seq + (int64)w.b * seqlen + t : nullptr;
        float M_here[STEPS];
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
          const float4 v = M_CONSTANT ? make_float4(constant, constant, constant, constant) : matrix[m * ROW + place_of(q, w.j, 0)];
          M_here[4 * q] = v.x, M_here[4 * q + 1] = v.y, M_here[4 * q + 2] = v.z, M_here[4 * q + 3] = v.w;
        }
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
          const int k = REVERSE ? STEPS - 1 - s : s;
          const float v = M_here[k];
          float a = ex2(A2 * delta[k]);
          const bool start = PACKED && cut.starts >> k & 1, ends = PACKED && VARLEN && cut.ends >> k & 1;
          if (REVERSE) {
            float g = fmaf(x[k], v, f);
            if (ends && p.dlast) g += p.dlast[seq[k] * row + at];
            f = start ? 0.f : a * g;
          } else {
            float add = x[k] * v;
            if (start && VARLEN && p.table) add = fmaf(a, p.table[seq[k] * row + at], add);
            f = start ? add : fmaf(a, f, add);
          }
        }
        const int reach = PACKED ? (REVERSE ? cut.reach_right : cut.reach_left) : (REVERSE ? LANES - 1 - w.j : w.j);
#pragma unroll
        for (int r = 1; r < LANES; r *= 2) {
          float near = REVERSE ? __shfl_down_sync(~0u, f, r * CHANNELS) : __shfl_up_sync(~0u, f, r * CHANNELS);
          float decay_near = REVERSE ? __shfl_down_sync(~0u, decay, r * CHANNELS) : __shfl_up_sync(~0u, decay, r * CHANNELS);
          if (reach >= r) f = fmaf(decay, near, f), decay *= decay_near;
        }
        __syncwarp();
        if (w.j == (REVERSE ? 0 : LANES - 1)) running[n].y = f;
        __syncwarp();
      }
    }
  }
#pragma unroll
  for (int r = CHANNELS; r < 32; r *= 2) sum += __shfl_xor_sync(~0u, sum, r);
  const int64 at = ((int64)w.b * p.stretches + block.stretch) * p.channels + w.d;
  if (w.here && w.j == 0) p.total[at] = cut_off ? __uint_as_float(0x7fc00000u) : sum;
  if (w.here)
    for (int n = w.j; n < N; n += LANES) p.local[at * N + n] = running[n].y;
}
#endif
