// The tensors of diffusion_step's CUDA kernels.
#include <limits>
#include <tuple>

#include "cuda_tensors.h"
#include "diffusion_step_cuda.cuh"
#include "sample_layout.h"

namespace sdfast {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The places of elements that lie by these sizes and strides, the first axis being that of samples.
Places places_of(const std::vector<int64_t>& sizes, const int64_t* strides) {
  Places places;
  int axes = 0;
  for (size_t axis = sizes.size() - 1; axis > 0; --axis) {
    if (sizes[axis] <= 1) continue;
    if (axes > 0 && strides[axis] == places.size[axes - 1] * places.stride[axes - 1]) {
      places.size[axes - 1] *= sizes[axis];
      continue;
    }
    STD_TORCH_CHECK(axes < kStepAxes, "sample: expected at most 8 axes in disorder");
    places.size[axes] = sizes[axis];
    places.stride[axes++] = strides[axis];
  }
  places.axes = axes > 0 ? axes : 1;
  int64_t inside = 1;  // elements of the axes before
  for (int axis = 0; axis < axes; ++axis) {
    if (places.stride[axis] == 1 && axis > 0 && inside % philox::kBlock == 0) {
      places.across = places.size[axis];
      places.along = inside / philox::kBlock;
    }
    inside *= places.size[axis];
  }
  return places;
}

bool lies_in_rows(const Places& places) { return places.axes == 1 && places.stride[0] == 1; }

// Tensors that live as long as the launch is prepared.
struct Operands {
  std::vector<Tensor> kept;

  Tensor keep(const Tensor& t) {
    kept.push_back(t);
    return t;
  }
  Tensor contiguous(const Tensor& t) {
    return keep(t.is_contiguous() ? t : torch::stable::contiguous(t));
  }
};

Numbers numbers_of(const Call& call, Operands& operands, const Tensor& t, const char* name,
                   IntHeaderOnlyArrayRef shape) {
  check_device(t, name);
  check_shape(t, name, shape);
  const bool is_double = t.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || t.scalar_type() == ScalarType::Float, name,
                  ": expected float32 or float64");
  const Tensor dense = operands.contiguous(t);
  if (is_double) return {call.input<double>(dense), true};
  return {call.input<float>(dense), false};
}

// What both operations share.
struct Arguments {
  Tensor sample, model_output;
  OptionalTensor previous_x0, noise, seeds;
  bool guided;
  std::optional<double> clip;
};

// Fills in the operands, lets `complete` add the numbers, launches; returns x' and x0.
template <typename Complete>
std::tuple<Tensor, Tensor> step(const Call& call, const Arguments& arguments,
                                const SampleLayout& layout, int64_t noise_rows, Tensor* model_input,
                                const Complete& complete) {
  const ScalarType dtype = arguments.sample.scalar_type();
  const Samples x(arguments.sample, "sample", layout, dtype);
  const Samples m(arguments.model_output, "model_output", layout, dtype, arguments.guided ? 2 : 1);
  std::optional<Samples> p;
  if (arguments.previous_x0) p.emplace(*arguments.previous_x0, "previous_x0", layout, dtype);
  Tensor out = layout.new_result(dtype), x0 = layout.new_result(dtype);
  Operands operands;
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    DiffusionStep<T> values;
    values.samples = layout.samples;
    values.size = layout.size;
    values.sample = call.input<T>(x.tensor());
    values.sample_stride = x.stride();
    values.model_output = call.input<T>(m.tensor());
    values.model_output_stride = m.stride();
    if (p) {
      values.previous_x0 = call.input<T>(p->tensor());
      values.previous_x0_stride = p->stride();
    }
    values.places = places_of(layout.sizes, layout.strides.data());
    bool together = true;
    if (arguments.noise && noise_rows == 0) {
      const Samples z(*arguments.noise, "noise", layout, dtype);
      values.noise = call.input<T>(operands.keep(z.tensor()));
      values.noise_stride = z.stride();
    } else if (arguments.noise) {
      const Tensor& z = *arguments.noise;
      check_device(z, "noise");
      std::vector<int64_t> shape = layout.sizes;
      shape.insert(shape.begin(), noise_rows);
      check_shape(z, "noise", shape);
      STD_TORCH_CHECK(z.scalar_type() == dtype, "noise: expected the dtype of the others");
      values.noise = call.input<T>(z);
      values.noise_row = z.stride(0);
      values.noise_stride = z.stride(1);
      values.noise_places = places_of(layout.sizes, z.strides().data() + 1);
      for (size_t axis = 1; axis < layout.sizes.size(); ++axis) {
        const bool same = z.stride(axis + 1) == layout.strides[axis];
        together = together && (same || layout.sizes[axis] <= 1);
      }
    }
    values.out = call.output<T>(out);
    values.x0 = call.output<T>(x0);
    if (model_input) values.model_input = call.output<T>(*model_input);
    values.guided = arguments.guided;
    values.clip =
        static_cast<float>(arguments.clip.value_or(std::numeric_limits<float>::infinity()));
    values.drawn = arguments.seeds.has_value();
    if (values.drawn) {
      STD_TORCH_CHECK(!arguments.noise, "seeds: expected no noise beside them");
      check_shape(*arguments.seeds, "seeds", {layout.samples});
      STD_TORCH_CHECK(arguments.seeds->scalar_type() == ScalarType::Long, "seeds: expected int64");
      Tensor seeds = operands.contiguous(*arguments.seeds);
      if (seeds.is_cpu() && layout.samples <= kSeedsOfLaunch) {
        std::copy_n(seeds.const_data_ptr<int64_t>(), layout.samples, values.few_seeds);
      } else {
        if (seeds.is_cpu() && !arguments.sample.is_cpu()) {
          Tensor there = empty({layout.samples}, ScalarType::Long);
          torch::stable::copy_(there, seeds, true);
          seeds = operands.keep(there);
        }
        values.seeds = call.input<int64_t>(seeds);
      }
    }
    complete(values, operands);
    diffusion_step(values, lies_in_rows(values.places), together, call.stream());
  });
  return {out, x0};
}

// sample: (N, ...). model_output: (N, ...), with guidance (2N, ...), the unconditional half first.
// coefficients: (7), as seeds on the device or the CPU. previous_x0, noise: as sample. seeds: (N),
// int64. Returns x' and x0, each as sample.
std::tuple<Tensor, Tensor> diffusion_step_cuda(Tensor sample, Tensor model_output,
                                               Tensor coefficients,
                                               std::optional<double> guidance_scale,
                                               OptionalTensor previous_x0, OptionalTensor noise,
                                               std::optional<double> clip, OptionalTensor seeds,
                                               int64_t step_index) {
  check_device(sample, "sample");  // another argument's may have led here
  STD_TORCH_CHECK(sample.dim() > 0, "sample: expected (N, ...)");
  const Call call(sample);
  const SampleLayout layout(sample);
  const Arguments arguments{
      sample, model_output, previous_x0, noise, seeds, guidance_scale.has_value(), clip};
  return step(call, arguments, layout, 0, nullptr, [&](auto& values, Operands& operands) {
    values.guidance_scale = static_cast<float>(guidance_scale.value_or(0));
    values.step = step_index;
    if (!coefficients.is_cpu()) {
      values.coefficients = numbers_of(call, operands, coefficients, "coefficients", {7});
      return;
    }
    check_shape(coefficients, "coefficients", {7});
    const Tensor k = torch::stable::contiguous(coefficients);
    if (k.scalar_type() == ScalarType::Double) {
      std::copy_n(k.const_data_ptr<double>(), 7, values.k);
    } else {
      std::copy_n(k.const_data_ptr<float>(), 7, values.k);
    }
  });
}

// coefficients: (n, 7). input_scale, guidance_scale: (n). counter: (), int64. noise: (n, N, ...).
// The others as above, all on the device. Returns x', x0, the model's next input, for both halves
// with guidance, and counter + 1.
std::tuple<Tensor, Tensor, Tensor, Tensor> diffusion_step_from_table_cuda(
    Tensor sample, Tensor model_output, Tensor coefficients, Tensor input_scale, Tensor counter,
    OptionalTensor guidance_scale, OptionalTensor previous_x0, std::optional<double> clip,
    OptionalTensor seeds, OptionalTensor noise) {
  check_device(sample, "sample");  // another argument's may have led here
  STD_TORCH_CHECK(sample.dim() > 0, "sample: expected (N, ...)");
  STD_TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(0) > 0,
                  "coefficients: expected (n, 7)");
  check_device(counter, "counter");
  check_shape(counter, "counter", {});
  STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Long, "counter: expected int64");
  if (seeds) check_device(*seeds, "seeds");
  const Call call(sample);
  const SampleLayout layout(sample);
  const int64_t steps = coefficients.size(0), copies = guidance_scale ? 2 : 1;
  std::vector<int64_t> sizes = layout.sizes, strides = layout.strides;
  sizes[0] *= copies;
  if (copies > 1) strides[0] = layout.size;
  Tensor model_input = empty_strided(sizes, strides, sample.scalar_type());
  Tensor next_counter = empty({}, ScalarType::Long);
  const Arguments arguments{
      sample, model_output, previous_x0, noise, seeds, guidance_scale.has_value(), clip};
  const auto results =
      step(call, arguments, layout, steps, &model_input, [&](auto& values, Operands& operands) {
        values.steps = steps;
        values.coefficients = numbers_of(call, operands, coefficients, "coefficients", {steps, 7});
        values.input_scales = numbers_of(call, operands, input_scale, "input_scale", {steps});
        if (guidance_scale) {
          values.guidance_scales =
              numbers_of(call, operands, *guidance_scale, "guidance_scale", {steps});
        }
        values.counter = call.input<int64_t>(counter);
        values.next_counter = call.output<int64_t>(next_counter);
      });
  return {std::get<0>(results), std::get<1>(results), model_input, next_counter};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("diffusion_step_cuda", TORCH_BOX(&diffusion_step_cuda));
  m.impl("diffusion_step_from_table_cuda", TORCH_BOX(&diffusion_step_from_table_cuda));
}

}  // namespace
}  // namespace sdfast
