// Sampling in two launches: a warp per tile of 1024 tokens, then a block per row. SPDX-License-Identifier: Apache-2.0
//
// The first launch is the one read of all logits, with 16-byte loads where a row allows them; of each tile it leaves
// the largest scores of its four chunks, sum exp(z), sum z exp(z) and how many tokens are finite: 32 bytes for 4096 of
// float32 logits. Rows and tiles fill the GPU alike, so a single row is read as fast as many. The second launch merges
// the tiles of a row in one order, draws a tile and reads that once more. Filters read again only what their bracket
// reaches (sample_filters.cuh): some chunks for top-k, min-p and a small nucleus; an eighth of the row and the chunks
// with a token of the nucleus for a wide one. So the floor of B rows is B * V logits read once, twice for a wide
// nucleus, and two launches for a few rows. Which thread takes which token follows from V alone, and so do all sums: a
// row has the same bits in any batch.
//
// Against the reference: as csrc/cpu/sample.cpp. Tiles of float logits are added up in float, to 2^-20 of their mass;
// where top-p ends nearer than that to a token's cumulative mass, all masses are added up once more in double.
#include "sample_draw.cuh"
#include "sample_tile.cuh"

namespace rlhf_fast::cuda {
namespace {

template <class A>
struct Scratch {
  Tile<A>* tiles;  // [rows, 1 or 2, count]: of the logits, and of the scores if they are others
  double* above;   // [rows, count * TILE_CHUNKS]
  int64_t count;   // of tiles in a row
};

// BARE: without bias, penalties and forbidden tokens, so that the scores are the logits.
template <class T, bool BARE>
__global__ void __launch_bounds__(TILE_WARPS* WARP, sizeof(T) < 8 && BARE ? 5 : 1)
    sample_tile_kernel(const __grid_constant__ Sampling s, Scratch<typename Wide<T>::type> scratch,
                       int blocks_per_row) {
  using A = typename Wide<T>::type;
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t tile = int64_t(blockIdx.x % blocks_per_row) * warps() + my_warp();
  if (tile >= scratch.count) return;
  const Knobs knobs(s, row);
  const Line<A, BARE> line(s, row, knobs);
  const Weigher<A> weigh(knobs.divisor());
  const int64_t first = tile * TILE, size = min(line.size - first, int64_t(TILE));
  A x[TILE_ITEMS];
  load<T>(line, first, x);
  Tile<A>* const to = scratch.tiles + row * (BARE ? 1 : 2) * scratch.count + tile;
  Tile<A> found = summarize(x, weigh, size);
  if constexpr (BARE) {
    if (my_lane() == 0) *to = found;
  } else {
    constexpr int SIDE = 16 / sizeof(T);
    bool broken = found.broken;
#pragma unroll
    for (int k = 0; k < TILE_ITEMS; k++) {
      const int64_t i = first + my_lane() * SIDE + k / SIDE * WARP * SIDE + k % SIDE;
      if (i >= line.size) continue;
      x[k] = line.changed(x[k], i);
      broken |= !(x[k] < A(INFINITE));
      if (!line.allowed(i)) x[k] = A(-INFINITE);
    }
    found.broken = __ballot_sync(ALL, broken) != 0;
    if (my_lane() == 0) *to = found;
    found = summarize(x, weigh, size);
    if (my_lane() == 0) to[scratch.count] = found;
  }
}

template <class A>
__device__ void finish(const Sampling& s, int64_t row, int status, const Drawn& drawn, double policy, double entropy) {
  if (threadIdx.x != 0) return;
  const A logprob = static_cast<A>(drawn.logprob), of_policy = static_cast<A>(policy);
  static_cast<int64_t*>(s.ids.data)[row] = drawn.id;
  static_cast<int64_t*>(s.kept.data)[row] = drawn.kept;
  static_cast<A*>(s.logprobs.data)[row] = logprob;
  static_cast<A*>(s.policy_logprobs.data)[row] = of_policy;
  static_cast<A*>(s.kept_logmass.data)[row] = of_policy - logprob;
  static_cast<A*>(s.entropy.data)[row] = static_cast<A>(entropy);
  static_cast<int8_t*>(s.status.data)[row] = static_cast<int8_t>(status);
}

// Blocks are half as large for double, whose threads take more registers.
template <class A>
constexpr int ROW_BLOCK = sizeof(A) == 8 ? ROW_WARPS / 2 : ROW_WARPS;

// PLAIN: without filters; two such blocks fit onto an SM.
template <class A, bool BARE, bool PLAIN>
__global__ void __launch_bounds__(ROW_BLOCK<A>* WARP, PLAIN ? 2 : 1)
    sample_row_kernel(const __grid_constant__ Sampling s, Scratch<A> scratch) {
  __shared__ Shared<A> shared;
  const int64_t row = blockIdx.x;
  const Knobs knobs(s, row);
  const Line<A, BARE> line(s, row, knobs);
  const Tile<A>* const of_row = scratch.tiles + row * (BARE ? 1 : 2) * scratch.count;
  const Tiles<A> tiles = {of_row + (BARE ? 0 : scratch.count), scratch.count, line.size};
  const Merged<A> policy(shared.meet, {of_row, scratch.count, line.size}, knobs.divisor());
  Merged<A> all = policy;
  if constexpr (!BARE) all = Merged<A>(shared.meet, tiles, knobs.divisor());
  const double nan = __builtin_nan("");
  if (policy.broken) return finish<A>(s, row, 1, {}, nan, nan);
  if (all.top == A(-INFINITE) || !knobs.in_range()) return finish<A>(s, row, 2, {}, nan, nan);

  const double log_mass = log(policy.mass);
  const A entropy = static_cast<A>(log_mass - policy.spread / policy.mass);
  const double u = uniform(Knobs::whole(s.seeds, row), Knobs::whole(s.positions, row));
  const Scale scale = {double(all.top), knobs.divisor()};
  Drawing<A, BARE> drawing(
      Brackets<A, BARE>{line, tiles, scale, shared, scratch.above + row * scratch.count * TILE_CHUNKS}, knobs, all, u);
  const A divisor = static_cast<A>(knobs.temperature), ratio = all.top / divisor;
  const bool greedy = divisor == A(0) || ratio == A(INFINITE) || ratio == A(-INFINITE) || knobs.top_p <= 0;
  const Drawn drawn = greedy ? Drawn{drawing.likeliest(), 1, 0} : drawing.template draw<PLAIN>();
  const double z = Scale{double(policy.top), knobs.divisor()}(line.raw(drawn.id));
  finish<A>(s, row, 0, drawn, z - log_mass, entropy);
}

template <class T>
void run(const Sampling& s, const View& scratch, cudaStream_t stream) {
  using A = typename Wide<T>::type;
  const bool bare = !s.bias && !s.counts && !s.allowed;
  const int64_t rows = s.logits.shape[0], count = (s.logits.shape[1] + TILE - 1) / TILE;
  const int64_t words = static_cast<int64_t>(sizeof(Tile<A>) / sizeof(double)) * (bare ? 1 : 2) + TILE_CHUNKS;
  if (scratch.dtype != Dtype::float64 || scratch.dims != 1 || scratch.stride[0] != 1 ||
      scratch.shape[0] < rows * count * words)
    throw std::invalid_argument("sample: scratch is too small");
  Tile<A>* const tiles = scratch.as<Tile<A>>();
  const Scratch<A> room = {tiles, reinterpret_cast<double*>(tiles + rows * count * (bare ? 1 : 2)), count};
  const int tile_warps = static_cast<int>(count < TILE_WARPS ? count : TILE_WARPS);
  const int64_t blocks = (count + tile_warps - 1) / tile_warps;
  launch(bare ? sample_tile_kernel<T, true> : sample_tile_kernel<T, false>, "sample_tile_kernel", rows * blocks,
         tile_warps * WARP, stream, s, room, static_cast<int>(blocks));
  const int64_t chunks = (s.logits.shape[1] + CHUNK - 1) / CHUNK;
  const int warps = static_cast<int>(chunks < ROW_BLOCK<A> ? chunks : ROW_BLOCK<A>);
  const bool plain = bare && !s.top_k && !s.top_p && !s.min_p;
  const auto kernel = plain  ? sample_row_kernel<A, true, true>
                      : bare ? sample_row_kernel<A, true, false>
                             : sample_row_kernel<A, false, false>;
  launch(kernel, "sample_row_kernel", rows, warps * WARP, stream, s, room);
}

}  // namespace

void sample(View logits, View seeds, View positions, View temperature, View top_k, View top_p, View min_p,
            View repetition_penalty, View presence_penalty, View frequency_penalty, View token_counts, View logit_bias,
            View allowed, View ids, View logprobs, View policy_logprobs, View kept_logmass, View entropy, View kept,
            View status, View scratch, int device, uintptr_t stream) {
  const Sampling s = {logits,
                      seeds,
                      positions,
                      temperature,
                      top_k,
                      top_p,
                      min_p,
                      repetition_penalty,
                      presence_penalty,
                      frequency_penalty,
                      token_counts,
                      logit_bias,
                      allowed,
                      ids,
                      logprobs,
                      policy_logprobs,
                      kept_logmass,
                      entropy,
                      kept,
                      status};
  check_sample(s);
  if (logits.shape[0] == 0) return;
  const DeviceGuard guard(device);
  const auto typed = logits.dtype == Dtype::float64    ? run<double>
                     : logits.dtype == Dtype::bfloat16 ? run<bfloat16>
                     : logits.dtype == Dtype::float16  ? run<float16>
                                                       : run<float>;
  typed(s, scratch, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace rlhf_fast::cuda
