// A GPU block on a CPU thread: what cuda_machine.cuh and the CUDA language give, for tests without a GPU.
// Every thread of a block is a fiber that runs until it waits for its warp or its block.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
using std::max;
using std::min;
typedef long long int64;
typedef unsigned int uint32;
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32 x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(uint32 x, uint32 y, uint32 z, uint32 w) { return {x, y, z, w}; }
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
static inline float __uint_as_float(uint32 v) { float f; memcpy(&f, &v, 4); return f; }
static inline uint32 __float_as_uint(float f) { uint32 v; memcpy(&v, &f, 4); return v; }

struct Index { int x; };
static Index threadIdx, blockIdx;
static float4 memory[65536];

// waits: 0 no, 1 warp, 2 block
struct Fiber { ucontext_t context; jmp_buf place; char* stack; int waits; bool begun, done; long round; };
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static uint32 mailbox[2][2048];
// A context is for the first entry alone: swapcontext asks the system for the signal mask at every switch.
static void resume(int i) {
  Fiber& f = fibers[i];
  if (_setjmp(scheduler)) return;
  threadIdx.x = i;
  if (f.begun) _longjmp(f.place, 1);
  f.begun = true;
  setcontext(&f.context);
}
static void wait_for(int what) {
  int me = threadIdx.x;
  fibers[me].waits = what;
  if (!_setjmp(fibers[me].place)) _longjmp(scheduler, 1);
}
static void finish() {
  fibers[threadIdx.x].done = true;
  _longjmp(scheduler, 1);
}
static void __syncthreads() { wait_for(2); }
static void __syncwarp() { wait_for(1); }
// What the lane `from` gave; its own value where `from` is outside the warp.
static uint32 __shfl_sync(uint32, uint32 v, int from) {
  int me = threadIdx.x, parity = fibers[me].round++ & 1, base = me / 32 * 32;
  mailbox[parity][me] = v;
  wait_for(1);
  return from < 0 || from > 31 ? v : mailbox[parity][base + from];
}
static float exchange(float v, int from) { return __uint_as_float(__shfl_sync(~0u, __float_as_uint(v), from)); }
static float __shfl_up_sync(uint32, float v, int hop) { return exchange(v, threadIdx.x % 32 - hop); }
static float __shfl_down_sync(uint32, float v, int hop) { return exchange(v, threadIdx.x % 32 + hop); }
static float __shfl_xor_sync(uint32, float v, int mask) { return exchange(v, threadIdx.x % 32 ^ mask); }
static uint32 __ballot_sync(uint32, bool v) {
  int me = threadIdx.x, parity = fibers[me].round++ & 1, base = me / 32 * 32;
  mailbox[parity][me] = v;
  wait_for(1);
  uint32 all = 0;
  for (int i = 0; i < 32; i++) all |= mailbox[parity][base + i] << i;
  return all;
}
static int __popc(uint32 v) { return __builtin_popcount(v); }
static int __reduce_max_sync(uint32, int v) {
  for (int hop = 1; hop < 32; hop *= 2) v = max(v, (int)__shfl_sync(~0u, v, threadIdx.x % 32 ^ hop));
  return v;
}
static int __ffs(uint32 v) { return __builtin_ffs(v); }
static bool __any_sync(uint32 m, bool v) { return __ballot_sync(m, v) != 0; }
static void atomicAdd(float* to, float v) { *to += v; }

#if IO == 0
typedef float io_t;
static float to_float(io_t v) { return v; }
static io_t from_float(float f) { return f; }
static void unpack(uint32, float&, float&) {}
static uint32 pack(float, float) { return 0; }
#else
struct io_t { unsigned short bits; };
static float to_float(io_t v) {
#if IO == 1
  _Float16 h; memcpy(&h, &v, 2); return (float)h;
#else
  return __uint_as_float((uint32)v.bits << 16);
#endif
}
static io_t from_float(float f) {
  io_t v;
#if IO == 1
  _Float16 h = (_Float16)f; memcpy(&v, &h, 2);
#else
  uint32 w = __float_as_uint(f);
  v.bits = f != f ? 0x7fc0 : (w + 0x7fff + (w >> 16 & 1)) >> 16;
#endif
  return v;
}
static void unpack(uint32 word, float& first, float& second) {
  io_t v;
  v.bits = word & 0xffff, first = to_float(v), v.bits = word >> 16, second = to_float(v);
}
static uint32 pack(float first, float second) { return from_float(first).bits | (uint32)from_float(second).bits << 16; }
#endif

static void take_turn() {}
static int thread_number() { return threadIdx.x; }
static float ex2(float x) { return exp2f(x); }
static float reciprocal(float x) { return 1.f / x; }
// Asynchronous: nothing arrives before the wait. A copy that is not waited for is never seen.
struct Copy { void* to; char from[16]; int bytes; };
static std::vector<Copy> copies[2048];
static void copy_async(void* to, const void* from, int bytes) {
  if ((uintptr_t)to % 16 || (bytes > 0 && (uintptr_t)from % 16)) abort();
  Copy c = {to, {}, 16};
  memcpy(c.from, from, bytes);
  copies[threadIdx.x].push_back(c);
}
static void copy_async_word(void* to, const void* from) {
  Copy c = {to, {}, 4};
  memcpy(c.from, from, 4);
  copies[threadIdx.x].push_back(c);
}
static void wait_async() {
  for (auto& c : copies[threadIdx.x]) memcpy(c.to, c.from, c.bytes);
  copies[threadIdx.x].clear();
}
template <bool LAST> static void round_from_left(float& x, float& decay, int hop) {
  float a = __shfl_up_sync(~0u, x, hop), b = LAST ? 0.f : __shfl_up_sync(~0u, decay, hop);
  if (threadIdx.x % 32 >= hop) { x = fmaf(decay, a, x); if (!LAST) decay *= b; }
}
template <bool LAST> static void round_from_right(float& x, float& decay, int hop) {
  float a = __shfl_down_sync(~0u, x, hop), b = LAST ? 0.f : __shfl_down_sync(~0u, decay, hop);
  if (threadIdx.x % 32 + hop < 32) { x = fmaf(decay, a, x); if (!LAST) decay *= b; }
}
static float from_left(float v, float edge, int hop) {
  float w = __shfl_up_sync(~0u, v, hop);
  return threadIdx.x % 32 >= hop ? w : edge;
}
static float from_right(float v, float edge, int hop) {
  float w = __shfl_down_sync(~0u, v, hop);
  return threadIdx.x % 32 + hop < 32 ? w : edge;
}
static uint4 load_global(const uint4* from) {
  if ((uintptr_t)from % 16) abort();
  return *from;
}
static void store_global(uint4* to, uint4 v) {
  if ((uintptr_t)to % 16) abort();
  *to = v;
}
static void add_global(float* to, float first, float second) {
  if ((uintptr_t)to % 8) abort();
  to[0] += first, to[1] += second;
}
static float upper(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }
static float rest(float v) { return v - upper(v); }
static float operands[2048][6];
static void add_product(float4& sum, float a0, float a1, float a2, float a3, float b0, float b1) {
  int me = threadIdx.x, base = me / 32 * 32, row = me % 32 / 4, column = me % 4;
  float mine[6] = {a0, a1, a2, a3, b0, b1};
  for (int i = 0; i < 6; i++) operands[me][i] = upper(mine[i]);
  wait_for(1);
  float* out[4] = {&sum.x, &sum.y, &sum.z, &sum.w};
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 8; k++)
      *out[i] += operands[base + 4 * row + k % 4][i / 2 + k / 4 * 2] * operands[base + 4 * (2 * column + i % 2) + k % 4][4 + k / 4];
  wait_for(1);
}
// What step_machine.cuh gives; a grid of one block meets nobody.
struct alignas(8) uint2 { uint32 x, y; };
static inline uint2 make_uint2(uint32 x, uint32 y) { return {x, y}; }
template <class T> static T read_aligned(const void* from) {
  if ((uintptr_t)from % sizeof(T)) abort();
  return *(const T*)from;
}
static uint4 read_once(const void* from) { return read_aligned<uint4>(from); }
static uint2 read_once_half(const void* from) { return read_aligned<uint2>(from); }
template <class T> static T read_shared(const T* from) { return *from; }
static void fetch_to_l2(const void*) {}
static float rsqrtf(float v) { return 1.f / sqrtf(v); }
static uint32 fragments[2048][6];
static void multiply(float (&c)[4], uint2 low, uint2 high, uint2 b) {
  int me = threadIdx.x, base = me / 32 * 32, g = me % 32 / 4, t = me % 4;
  uint32 mine[6] = {low.x, low.y, high.x, high.y, b.x, b.y};
  memcpy(fragments[me], mine, sizeof mine);
  wait_for(1);
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 8; k++) {  // pairs of inner indices
      uint32* left = fragments[base + 4 * g + k / 2];
      uint32* right = fragments[base + 4 * (2 * t + i % 2) + k / 2];
      float a0, a1, b0, b1;
      unpack(left[i / 2 * 2 + k % 2], a0, a1), unpack(right[4 + k % 2], b0, b1);
      c[i] += a0 * b0 + a1 * b1;
    }
  wait_for(1);
}
// A gate: rounds it has opened, arrivals it waits for and those that have come, bytes still promised.
typedef int64 gate_t;
struct Gate { short rounds; signed char wanted, come; int bytes; };
static void make_gate(gate_t* gate, int arrivals) { *(Gate*)gate = {0, (signed char)arrivals, 0, 0}; }
static void gates_made() {}
static void change(gate_t* gate, int arrivals, int bytes) {
  Gate& g = *(Gate*)gate;
  g.come += arrivals, g.bytes += bytes;
  if (g.come == g.wanted && g.bytes == 0) g.come = 0, g.rounds++;
}
static void arrive(gate_t* gate) { change(gate, 1, 0); }
static void arrive_and_promise(gate_t* gate, int bytes) { change(gate, 1, bytes); }
static void pass(gate_t* gate, int round) {
  while (((Gate*)gate)->rounds <= round) wait_for(3);
}
static void copy_bytes(void* to, const void* from, int bytes, gate_t* gate) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) abort();
  memcpy(to, from, bytes);
  change(gate, 0, -bytes);
}
static bool came_last(uint32*, uint32) { return true; }
static int workers;
static void meet_in_block(int count) { workers = count, wait_for(4); }
static void meet(uint32*, uint32& due, int blocks, int count) {
  if (blocks != 1) abort();
  due += blocks;
  meet_in_block(count);
}
static void fiber_main();
static void run_block(int threads, int bytes) {
  constexpr int FENCE = 1024;
  if (bytes + FENCE > (int)sizeof memory) abort();
  memset(memory, 0xff, bytes + FENCE);  // NaN: what is read before it is written shows
  fibers.resize(threads);
  for (int i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    if (!f.stack) f.stack = (char*)malloc(1 << 17);
    f.waits = 0, f.begun = f.done = false, f.round = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = 1 << 17, f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
    copies[i].clear();
  }
  for (int left = threads; left > 0;) {
    bool moved = false;
    for (int i = 0; i < threads; i++)
      if (!fibers[i].done && !fibers[i].waits) {
        moved = true;
        resume(i);
        left -= fibers[i].done;
      }
    for (int w = 0; w < threads; w += 32) {
      bool all = true;
      for (int i = w; i < w + 32; i++) all &= fibers[i].waits == 1;
      if (all) for (int i = w; i < w + 32; i++) fibers[i].waits = 0, moved = true;
    }
    for (auto& f : fibers)  // those at a gate look again
      if (f.waits == 3) f.waits = 0, moved = true;
    bool here = workers > 0;
    for (int i = 0; i < workers; i++) here &= fibers[i].waits == 4;
    if (here) for (int i = 0; i < workers; i++) fibers[i].waits = 0, moved = true;
    bool all = true;
    for (auto& f : fibers) all &= f.waits == 2;
    if (all) for (auto& f : fibers) f.waits = 0, moved = true;
    if (!moved && left > 0) { fprintf(stderr, "deadlock in the emulated block\n"); abort(); }
  }
  for (int i = 0; i < FENCE; i++)
    if (((unsigned char*)memory)[bytes + i] != 0xff) { fprintf(stderr, "a write beyond shared memory\n"); abort(); }
}
