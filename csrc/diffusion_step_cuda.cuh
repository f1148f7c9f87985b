// diffusion_step on CUDA: guidance, clipped x0, the linear update and its noise, in one launch.
//
// Algorithm. A thread takes 16 bytes of a sample of every operand, in fp32; each result is rounded
// once. Noise drawn from seeds comes in Philox's blocks: then a thread takes the four elements that
// count 4 b to 4 b + 3 in row-major order, wherever they lie (cuda_philox.cuh). Numbers of the step
// are arguments of the launch, or are read from tables on the device by a counter that lies there,
// too. Products and sums of the update are rounded one by one: torch's bits, but for drawn noise.
// Bytes: every operand and result once. Limit: for latents of a few images the launch, above memory
// bandwidth, with drawn noise in 16 bits its arithmetic next to it.
#pragma once

#include "cuda_philox.cuh"

namespace sdfast {

constexpr int kStepThreads = 256;  // at most
constexpr int kSeedsOfLaunch = 16;
constexpr int kStepAxes = 8;

// Numbers on the device, fp32 or fp64.
struct Numbers {
  const void* data = nullptr;
  bool is_double = false;

  // Those from i on.
  template <int N>
  __device__ void read(int64_t i, float (&to)[N]) const {
    const auto read_as = [&](auto* from) {
#pragma unroll
      for (int j = 0; j < N; ++j) to[j] = static_cast<float>(from[i + j]);
    };
    is_double ? read_as(static_cast<const double*>(data))
              : read_as(static_cast<const float*>(data));
  }
  __device__ float operator[](int64_t i) const {
    float value[1];
    read(i, value);
    return value[0];
  }
};

// Where the elements of a sample lie, by their place in row-major order: axes, the fastest first.
struct Places {
  int axes = 1;
  int64_t size[kStepAxes] = {}, stride[kStepAxes] = {1};  // the last axis' size is not looked at
  // What lies next to each other in memory is next to each other in this order of the blocks: for
  // every run of `across * along` of them, `across` takes turns first.
  int64_t across = 1, along = 1;

  __device__ int64_t of(int64_t element) const {
    int64_t at = 0;
#pragma unroll 1
    for (int axis = 0; axis + 1 < axes; ++axis) {
      const int64_t rest = element / size[axis];
      at += (element - rest * size[axis]) * stride[axis];
      element = rest;
    }
    return at + element * stride[axes - 1];
  }
  __device__ int64_t block(int64_t i) const {
    if (across == 1) return i;
    const int64_t run = i / (across * along), in_run = i % (across * along);
    return run * across * along + in_run % across * along + in_run / across;
  }
};

// Samples of `size` elements; those of an operand are its stride apart. Null: absent.
template <typename T>
struct DiffusionStep {
  const T *sample = nullptr, *model_output = nullptr, *previous_x0 = nullptr, *noise = nullptr;
  T *out = nullptr, *x0 = nullptr, *model_input = nullptr;  // their samples lie without gaps
  int64_t samples = 0, size = 0;
  int64_t sample_stride = 0, model_output_stride = 0, previous_x0_stride = 0, noise_stride = 0;
  Places places, noise_places;
  // One step's numbers: from the host, or the coefficients from the device.
  float k[7] = {}, guidance_scale = 0, clip = 0;
  bool guided = false;
  int64_t step = 0;
  Numbers coefficients;
  // Or tables of `steps` rows, of which `counter` says one; the noise of a step is noise_row apart.
  Numbers input_scales, guidance_scales;
  const int64_t* counter = nullptr;
  int64_t* next_counter = nullptr;
  int64_t steps = 1, noise_row = 0;
  // What noise is drawn from: on the device, or a few from the host.
  bool drawn = false;
  const int64_t* seeds = nullptr;
  int64_t few_seeds[kSeedsOfLaunch] = {};
};

struct StepNumbers {
  float k[7], guidance_scale, input_scale;
  int64_t step, noise_at;
};

template <typename T>
__device__ StepNumbers numbers_of(const DiffusionStep<T>& call) {
  StepNumbers numbers;
  numbers.step = call.step;
  numbers.guidance_scale = call.guidance_scale;
  numbers.input_scale = 1;
  int64_t row = 0;
  if (call.counter) {
    const int64_t last = call.steps - 1, counter = *call.counter;
    row = counter < 0 ? 0 : counter > last ? last : counter;
    numbers.step = row;
    numbers.input_scale = call.input_scales[row < last ? row + 1 : last];
    if (call.guided) numbers.guidance_scale = call.guidance_scales[row];
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *call.next_counter = counter + 1;
  }
  numbers.noise_at = row * call.noise_row;
#pragma unroll
  for (int i = 0; i < 7; ++i) numbers.k[i] = call.k[i];
  if (call.coefficients.data) call.coefficients.read(7 * row, numbers.k);
  return numbers;
}

template <typename T>
__device__ uint64_t seed_of(const DiffusionStep<T>& call, int64_t n) {
  return call.seeds ? call.seeds[n] : call.few_seeds[n];
}

// What one element is made of; those of absent terms are not looked at.
struct StepElement {
  float x, unconditional, conditional, previous_x0, noise;
};
struct StepResult {
  float out, x0;
};

template <typename T>
__device__ StepResult step_of(const DiffusionStep<T>& call, const StepNumbers& numbers,
                              const StepElement& e) {
  const float* k = numbers.k;
  float m = e.unconditional;
  if (call.guided) {
    m = __fadd_rn(m, __fmul_rn(numbers.guidance_scale, __fadd_rn(e.conditional, -m)));
  }
  float x0 = __fadd_rn(__fmul_rn(k[0], e.x), __fmul_rn(k[1], m));
  x0 = x0 < -call.clip ? -call.clip : x0 > call.clip ? call.clip : x0;  // NaN stays NaN
  float out = __fadd_rn(__fmul_rn(k[2], x0), __fmul_rn(k[3], e.x));
  out = __fadd_rn(out, __fmul_rn(k[4], m));
  if (call.previous_x0) out = __fadd_rn(out, __fmul_rn(k[5], e.previous_x0));
  if (call.noise || call.drawn) out = __fadd_rn(out, __fmul_rn(k[6], e.noise));
  return {out, x0};
}

// Every operand lies as the results do, in vectors of N; where noise is drawn, in row-major order.
template <typename T, int N, bool kDrawn>
__global__ void __launch_bounds__(kStepThreads) step_kernel(DiffusionStep<T> call) {
  static_assert(!kDrawn || N == philox::kBlock);
  using Values = Vector<T, N>;
  const StepNumbers numbers = numbers_of(call);
  const int64_t block = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, i = block * N;
  if (i >= call.size) return;
  const auto values = [&](const T* data, int64_t n, int64_t stride) {
    return *reinterpret_cast<const Values*>(data + n * stride + i);
  };
  for (int64_t n = blockIdx.y; n < call.samples; n += gridDim.y) {
    // All loads first: nothing waits for one before the last is on its way.
    const Values x = values(call.sample, n, call.sample_stride);
    const Values m = values(call.model_output, n, call.model_output_stride);
    Values conditional{}, previous_x0{}, noise{};
    if (call.guided) {
      conditional = values(call.model_output, n + call.samples, call.model_output_stride);
    }
    if (call.previous_x0) previous_x0 = values(call.previous_x0, n, call.previous_x0_stride);
    if (!kDrawn && call.noise) {
      noise = values(call.noise + numbers.noise_at, n, call.noise_stride);
    }
    float z[N] = {};
    if constexpr (kDrawn) philox::draw(seed_of(call, n), block, numbers.step, z);
    Values out, x0, model_input;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const StepResult result =
          step_of(call, numbers,
                  {to_float(x.values[j]), to_float(m.values[j]), to_float(conditional.values[j]),
                   to_float(previous_x0.values[j]), kDrawn ? z[j] : to_float(noise.values[j])});
      out.values[j] = from_float<T>(result.out);
      x0.values[j] = from_float<T>(result.x0);
      model_input.values[j] = from_float<T>(to_float(out.values[j]) * numbers.input_scale);
    }
    const auto store_at = [&](T* to, int64_t n, const Values& what) {
      *reinterpret_cast<Values*>(to + n * call.size + i) = what;
    };
    store_at(call.out, n, out);
    store_at(call.x0, n, x0);
    if (!call.model_input) continue;
    store_at(call.model_input, n, model_input);
    if (call.guided) store_at(call.model_input, n + call.samples, model_input);
  }
}

// The same element by element: results lie in any order, noise from a table in one of its own.
template <typename T>
__global__ void __launch_bounds__(kStepThreads) placed_step_kernel(DiffusionStep<T> call) {
  const StepNumbers numbers = numbers_of(call);
  const int64_t blocks = ceil_div(call.size, philox::kBlock);
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= blocks) return;
  const int64_t block = call.places.block(i), first = block * philox::kBlock;
  for (int64_t n = blockIdx.y; n < call.samples; n += gridDim.y) {
    float z[philox::kBlock] = {};
    if (call.drawn) philox::draw(seed_of(call, n), block, numbers.step, z);
#pragma unroll
    for (int j = 0; j < philox::kBlock; ++j) {
      if (first + j >= call.size) break;
      const int64_t at = call.places.of(first + j);
      const auto value = [&](const T* data, int64_t n, int64_t stride) {
        return to_float(data[n * stride + at]);
      };
      StepElement element{value(call.sample, n, call.sample_stride),
                          value(call.model_output, n, call.model_output_stride), 0, 0, z[j]};
      if (call.guided) {
        element.conditional = value(call.model_output, n + call.samples, call.model_output_stride);
      }
      if (call.previous_x0) {
        element.previous_x0 = value(call.previous_x0, n, call.previous_x0_stride);
      }
      if (call.noise) {
        element.noise = to_float(
            call.noise[numbers.noise_at + n * call.noise_stride + call.noise_places.of(first + j)]);
      }
      const StepResult result = step_of(call, numbers, element);
      const T out = from_float<T>(result.out);
      call.out[n * call.size + at] = out;
      call.x0[n * call.size + at] = from_float<T>(result.x0);
      if (!call.model_input) continue;
      const T model_input = from_float<T>(to_float(out) * numbers.input_scale);
      call.model_input[n * call.size + at] = model_input;
      if (call.guided) call.model_input[(n + call.samples) * call.size + at] = model_input;
    }
  }
}

// `in_rows`: elements lie in row-major order; `together`: noise that is given lies as they do.
template <typename T>
void diffusion_step(const DiffusionStep<T>& call, bool in_rows, bool together,
                    cudaStream_t stream) {
  if (call.samples * call.size == 0 && !call.counter) return;  // the counter goes on
  const auto run = [&](auto* kernel, int64_t width) {
    const int64_t threads = ceil_div(call.size, width);
    const int64_t rows = call.samples < 65535 ? call.samples : 65535;
    // Few go to many multiprocessors, each with little to start.
    const bool few = threads * rows < int64_t{kStepThreads} * current_device().multiprocessors;
    const int64_t block = few ? 64 : kStepThreads, blocks = ceil_div(threads, block);
    const auto at_least_one = [](int64_t n) { return static_cast<unsigned>(n > 0 ? n : 1); };
    launch(kernel, {dim3(at_least_one(blocks), at_least_one(rows)), dim3(block)}, stream, call);
  };
  const auto fits = [&](int64_t width) {
    const auto operand = [&](const T* data, int64_t stride) {
      return !data || (stride % width == 0 && is_aligned(data, width * sizeof(T)));
    };
    return call.size % width == 0 && operand(call.sample, call.sample_stride) &&
           operand(call.model_output, call.model_output_stride) &&
           operand(call.previous_x0, call.previous_x0_stride) &&
           operand(call.noise, call.noise_stride) && call.noise_row % width == 0;
  };
  constexpr int kWidest = kVector<T>, kBlock = philox::kBlock;
  if (call.drawn && in_rows && fits(kBlock)) return run(step_kernel<T, kBlock, true>, kBlock);
  if (call.drawn || !together) return run(placed_step_kernel<T>, kBlock);
  if (fits(kWidest)) return run(step_kernel<T, kWidest, false>, kWidest);
  run(step_kernel<T, 1, false>, 1);
}

}  // namespace sdfast
