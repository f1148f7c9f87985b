// diffusion_step on CPU, for fp32, bf16 and fp16.
//
// Algorithm. One pass: per vector of the sample the guided model output, the clipped x0 and the
// linear combination of all, in fp32; each result is rounded once. Noise that is given by seeds is
// drawn a tile at a time, in L1 (cpu_philox.h).
// Compiled without contraction to FMA: bit for bit what torch gives, but for noise drawn here.
// Bytes: every input and both results once.
// Limit: memory bandwidth, with seeds the arithmetic of the noise; latents are small, so mostly the
// call itself.
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "cpu_philox.h"
#include "cpu_tensors.h"
#include "sample_layout.h"

namespace sdfast {
namespace {

using simd::Vec;

// The k of the formula in sdfast/ops/diffusion_step.py, and what goes with them.
struct Step {
  float k[7];
  float guidance_scale, clip;
};

// Pointers into one sample. Without guidance `conditional` is not read; previous_x0 and noise are
// null where their term is absent. Noise that is drawn is fp32.
template <typename T, typename Noise = T>
struct Inputs {
  const T *sample, *unconditional, *conditional, *previous_x0;
  const Noise* noise;
};

template <bool kGuided, typename T, typename Noise>
void step(const Inputs<T, Noise>& in, int64_t begin, int64_t end, const Step& step, T* previous,
          T* x0) {
  const auto [sample, unconditional, conditional, previous_x0, noise] = in;
  const float k0 = step.k[0], k1 = step.k[1], k2 = step.k[2], k3 = step.k[3], k4 = step.k[4];
  const float k5 = step.k[5], k6 = step.k[6];
  const float guidance_scale = step.guidance_scale, clip = step.clip;
  simd::for_each_vector(begin, end, [=](int64_t i, auto lanes) {
    const Vec x = simd::load(sample + i, lanes);
    Vec m = simd::load(unconditional + i, lanes);
    if (kGuided) m += guidance_scale * (simd::load(conditional + i, lanes) - m);
    const Vec clean = simd::at_most(simd::at_least(k0 * x + k1 * m, -clip), clip);
    Vec result = k2 * clean + k3 * x + k4 * m;
    if (previous_x0) result += k5 * simd::load(previous_x0 + i, lanes);
    if (noise) result += k6 * simd::load(noise + i, lanes);
    simd::store(previous + i, result, lanes);
    simd::store(x0 + i, clean, lanes);
  });
}

// The same with the noise of `stream`, whose elements are counted in logical order.
template <bool kGuided, typename T>
void step_and_draw(const Inputs<T>& in, int64_t begin, int64_t end, const Step& values,
                   const philox::Stream& stream, LogicalIndex index, T* previous, T* x0) {
  constexpr int64_t kTile = 512;
  static_assert(kTile % philox::kChunk == 0);
  alignas(64) float noise[kTile];
  while (begin < end) {
    const int64_t first = index.in_order() ? begin / philox::kBlock * philox::kBlock : begin;
    const int64_t last = std::min(end, first + kTile);
    if (index.in_order()) {
      philox::draw(stream, first, last, noise);
    } else {
      philox::draw_scattered(stream, [&] { return index.next(); }, last - first, noise);
    }
    const Inputs<T, float> tile{
        in.sample + begin, in.unconditional + begin, kGuided ? in.conditional + begin : nullptr,
        in.previous_x0 ? in.previous_x0 + begin : nullptr, noise + (begin - first)};
    step<kGuided>(tile, 0, last - begin, values, previous + begin, x0 + begin);
    begin = last;
  }
}

// sample: (N, ...). model_output: (N, ...), with guidance (2N, ...), the unconditional half first.
// coefficients: (7). previous_x0, noise: as sample. seeds: (N), int64. Returns x' and x0, each as
// sample.
std::tuple<Tensor, Tensor> diffusion_step_cpu(
    Tensor sample, Tensor model_output, Tensor coefficients, std::optional<double> guidance_scale,
    std::optional<Tensor> previous_x0, std::optional<Tensor> noise, std::optional<double> clip,
    std::optional<Tensor> seeds, int64_t step_index) {
  STD_TORCH_CHECK(sample.dim() > 0, "sample: expected (N, ...)");
  const SampleLayout layout(sample);
  const ScalarType dtype = sample.scalar_type();
  const Samples x(sample, "sample", layout, dtype);
  const Samples m(model_output, "model_output", layout, dtype, guidance_scale ? 2 : 1);
  const Samples p(previous_x0 ? *previous_x0 : sample, "previous_x0", layout, dtype);
  const Samples z(noise ? *noise : sample, "noise", layout, dtype);
  const Values k(coefficients, "coefficients", {7});
  if (seeds) {
    STD_TORCH_CHECK(!noise, "seeds: expected no noise beside them");
    check_device(*seeds, "seeds");
    check_shape(*seeds, "seeds", {layout.samples});
    STD_TORCH_CHECK(seeds->scalar_type() == ScalarType::Long, "seeds: expected int64");
    seeds = torch::stable::contiguous(*seeds);
  }
  Step values;
  std::copy_n(k.data(), 7, values.k);
  values.guidance_scale = static_cast<float>(guidance_scale.value_or(0));
  values.clip = static_cast<float>(clip.value_or(std::numeric_limits<float>::infinity()));
  Tensor previous = layout.new_result(dtype), x0 = layout.new_result(dtype);
  // Every seed counts the elements of its own sample.
  const bool joined = !seeds && x.joined() && m.joined() && p.joined() && z.joined();
  const int64_t grain = seeds ? 8192 : 32768;
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    T* const previous_data = static_cast<T*>(previous.mutable_data_ptr());
    T* const x0_data = static_cast<T*>(x0.mutable_data_ptr());
    const T* const conditional = m.data<T>() + layout.samples * m.stride();
    const int64_t* const seeds_data = seeds ? seeds->const_data_ptr<int64_t>() : nullptr;
    const auto part = [&](auto guided, int64_t n, int64_t begin, int64_t end) {
      const Inputs<T> in{x.data<T>() + n * x.stride(), m.data<T>() + n * m.stride(),
                         conditional + n * m.stride(),
                         previous_x0 ? p.data<T>() + n * p.stride() : nullptr,
                         noise ? z.data<T>() + n * z.stride() : nullptr};
      T *const to = previous_data + n * layout.size, *const x0_to = x0_data + n * layout.size;
      if (seeds_data) {
        const philox::Stream stream(seeds_data[n], step_index);
        step_and_draw<guided>(in, begin, end, values, stream, LogicalIndex(layout, begin), to,
                              x0_to);
      } else {
        step<guided>(in, begin, end, values, to, x0_to);
      }
    };
    const auto parts = [&](auto guided) {
      layout.for_each_part(
          joined, [&](int64_t n, int64_t begin, int64_t end) { part(guided, n, begin, end); },
          grain);
    };
    guidance_scale ? parts(std::true_type()) : parts(std::false_type());
  });
  return {previous, x0};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("diffusion_step", TORCH_BOX(&diffusion_step_cpu));
}

}  // namespace
}  // namespace sdfast
