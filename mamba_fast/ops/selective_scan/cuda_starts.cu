// Where packed sequences start, as bits: starts (B, words), 32 tokens a word and one word more.
extern "C" __global__ void __launch_bounds__(128) scan_starts(const __grid_constant__ Params p) {
  take_turn();
  const int64 word = ((int64)blockIdx.x * 128 + threadIdx.x) / 32, b = word / p.words;
  if (b >= p.batch) return;
  const int lane = threadIdx.x % 32, t = (int)(word % p.words) * 32 + lane;
  const uint32 bits = __ballot_sync(~0u, starts_at(p.seq + b * p.seqlen, t, p.seqlen));
  if (lane == 0) const_cast<uint32*>(p.starts)[word] = bits;
}
