// Generalised advantage estimation: an affine scan from the last valid token of each sequence to its first.
// SPDX-License-Identifier: Apache-2.0
//
// Usual path: a block per sequence walks over its chunks. Few and long sequences: a block per chunk, in three launches;
// what the chunks hand on is kept in the outputs until these are written. Both give the same bits.
#include "gae.h"
#include "gae_scan.cuh"

namespace rlhf_fast::cuda {
namespace {

// So many registers may a thread take; left to itself the compiler spills some kernels to fit in more blocks.
template <class T, bool UNIT>
constexpr int BLOCKS_PER_SM = UNIT ? (sizeof(T) == 4 ? 3 : 2) : 1;

// Block b < B takes sequence b; with cu_seqlens block B clears what lies outside of all sequences.
template <class T, bool UNIT>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<T, UNIT>) gae_kernel(Arguments<T> args) {
  if (blockIdx.x == args.sequences) {
    clear(args, 0, 0, offset(args, 0));
    clear(args, 0, offset(args, args.sequences), args.tokens);
    return;
  }
  const Sequence<T, UNIT> seq(args, blockIdx.x);
  const T power = power_of_lane(args.gamma_lam);
  const int64_t last = last_valid(seq);
  clear(args, blockIdx.x, last + 1, seq.end);
  Items<T> items, following;
  items.load(seq, last);
  T u = seq.first;
  for (int64_t top = last; top >= seq.start; top -= CHUNK) {
    following.load(seq, top - CHUNK);  // in flight while this chunk is scanned
    const Scan<T> scan = scan_chunk(items, args, power);
    store(seq, top, items, scan, u);
    u = scan.all(u);
    items = following;
  }
}

// The chunk that a block of the long path takes: chunk `index` of sequence `sequence`, counted from its end.
struct Place {
  int64_t sequence, index;
};

// Padded: ceil(T / CHUNK) blocks per row. Packed: sequence b owns the blocks from cu_seqlens[b] / CHUNK + b up to where
// the next one begins, which are enough for it and need no prefix sum.
template <class T>
__device__ Place place_of_block(const Arguments<T>& args) {
  const int64_t block = blockIdx.x;
  if (!args.cu_seqlens) {
    const int64_t per_row = (args.tokens + CHUNK - 1) / CHUNK;
    return {block / per_row, block % per_row};
  }
  int64_t low = 0, high = args.sequences;  // the last sequence whose first block is not after this one
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offset(args, middle) / CHUNK + middle <= block ? low : high) = middle;
  }
  return {low, block - (offset(args, low) / CHUNK + low)};
}

// First launch: what each chunk makes of what it is handed, kept in the outputs at the chunk's last token.
template <class T, bool UNIT>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<T, UNIT>) gae_chunk_kernel(Arguments<T> args) {
  const Place place = place_of_block(args);
  if (place.index < 0) return;
  const Sequence<T, UNIT> seq(args, place.sequence);
  const int64_t top = last_valid(seq) - place.index * CHUNK;
  if (top < seq.start) return;
  Items<T> items;
  items.load(seq, top);
  const Affine<T> all = scan_chunk(items, args, power_of_lane(args.gamma_lam)).all;
  if (threadIdx.x == 0) {
    seq.advantages[top] = all.a;
    seq.returns[top] = all.b;
  }
}

// Second launch, a block per sequence: what each chunk is handed, in the order in which gae_kernel comes to it.
template <class T>
__global__ void __launch_bounds__(THREADS) gae_carry_kernel(Arguments<T> args) {
  __shared__ Affine<T> chunks[THREADS];
  __shared__ T handed[THREADS];
  const Sequence<T, false> seq(args, blockIdx.x);
  T u = seq.first;
  for (int64_t top = last_valid(seq); top >= seq.start; top -= int64_t(THREADS) * CHUNK) {
    const int64_t mine = top - int64_t(threadIdx.x) * CHUNK;
    chunks[threadIdx.x] =
        mine >= seq.start ? Affine<T>{seq.advantages[mine], seq.returns[mine]} : Affine<T>{T(1), T(0)};
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 8
      for (int i = 0; i < THREADS; i++) {
        handed[i] = u;
        u = chunks[i](u);
      }
    }
    __syncthreads();
    if (mine >= seq.start) seq.advantages[mine] = handed[threadIdx.x];
  }
}

// Third launch: the chunks once more, now with what they are handed.
template <class T, bool UNIT>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM<T, UNIT>) gae_apply_kernel(Arguments<T> args) {
  if (args.cu_seqlens) {  // this block's share of what lies outside of all sequences
    const int64_t from = int64_t(blockIdx.x) * CHUNK, to = min(from + CHUNK, args.tokens);
    clear(args, 0, from, min(to, offset(args, 0)));
    clear(args, 0, max(from, offset(args, args.sequences)), to);
  }
  const Place place = place_of_block(args);
  if (place.index < 0) return;
  const Sequence<T, UNIT> seq(args, place.sequence);
  const int64_t last = last_valid(seq), top = last - place.index * CHUNK;
  const int64_t behind = last + 1 + place.index * CHUNK;  // this block's share of the padding
  clear(args, place.sequence, behind, min(behind + CHUNK, seq.end));
  if (top < seq.start) return;
  const T u = seq.advantages[top];  // read by all before the scan's barrier, overwritten after it
  Items<T> items;
  items.load(seq, top);
  const Scan<T> scan = scan_chunk(items, args, power_of_lane(args.gamma_lam));
  store(seq, top, items, scan, u);
}

// The usual path would leave most of the GPU idle for long. Decided by shapes alone, so without a sync; the numbers are
// estimates (a chunk takes about 1 us, the two launches more and the second read about 10), not measurements.
bool few_and_long(int64_t sequences, int64_t longest, int64_t tokens) {
  return sequences <= 64 && longest >= 16 * CHUNK && tokens >= 4 * CHUNK * sequences;
}

template <class T, bool UNIT>
void enqueue(const Arguments<T>& args, cudaStream_t stream) {
  const bool packed = args.cu_seqlens != nullptr;
  const int64_t all = packed ? args.tokens : args.sequences * args.tokens;
  if (args.sequences > 0 && few_and_long(args.sequences, args.tokens, all)) {
    const int64_t chunks =
        packed ? args.tokens / CHUNK + args.sequences : args.sequences * ((args.tokens + CHUNK - 1) / CHUNK);
    launch(gae_chunk_kernel<T, UNIT>, "gae_chunk_kernel", chunks, THREADS, stream, args);
    launch(gae_carry_kernel<T>, "gae_carry_kernel", args.sequences, THREADS, stream, args);
    launch(gae_apply_kernel<T, UNIT>, "gae_apply_kernel", chunks, THREADS, stream, args);
    return;
  }
  const int64_t spans = (args.tokens + SPAN - 1) / SPAN;  // of the longest sequence there may be
  const int threads = WARP * static_cast<int>(spans < WARPS ? spans : WARPS);
  launch(gae_kernel<T, UNIT>, "gae_kernel", args.sequences + packed, threads, stream, args);
}

template <class D>
Rows<D> rows(const View& view) {
  const bool packed = view.dims == 1;
  return {static_cast<D*>(view.data), packed ? 0 : view.stride[0], view.stride[packed ? 0 : 1]};
}

template <class T>
void run(const View& rewards, const View& values, const View& mask, const View& last_values, const View& cu_seqlens,
         double gamma, double lam, bool zero, const View& advantages, const View& returns, cudaStream_t stream) {
  const Arguments<T> args = {rows<const T>(rewards),
                             rows<const T>(values),
                             rows<const uint8_t>(mask),
                             last_values.as<const T>(),
                             last_values.stride[0],
                             cu_seqlens.data,
                             cu_seqlens.stride[0],
                             cu_seqlens.dtype == Dtype::int64,
                             rows<T>(advantages),
                             rows<T>(returns),
                             cu_seqlens ? cu_seqlens.shape[0] - 1 : rewards.shape[0],
                             rewards.shape[rewards.dims - 1],
                             static_cast<T>(gamma),
                             static_cast<T>(gamma * lam),
                             zero};
  bool unit = true;
  for (const View* view : {&rewards, &values, &mask, &advantages, &returns}) unit &= view->stride[view->dims - 1] == 1;
  unit ? enqueue<T, true>(args, stream) : enqueue<T, false>(args, stream);
}

}  // namespace

void gae(View rewards, View values, View mask, View last_values, View cu_seqlens, double gamma, double lam,
         const std::string& holes, View advantages, View returns, int device, uintptr_t stream) {
  check_gae(rewards, values, mask, last_values, cu_seqlens, holes, advantages, returns);
  if (!advantages) return;  // no token at all
  const DeviceGuard guard(device);
  const auto run_typed = rewards.dtype == Dtype::float64 ? run<double> : run<float>;
  run_typed(rewards, values, mask, last_values, cu_seqlens, gamma, lam, holes == "zero", advantages, returns,
            reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace rlhf_fast::cuda
