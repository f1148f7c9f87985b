// The kernels beside this file as functions of NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "kernels.cuh"

namespace py = pybind11;

extern "C" void simt_seed(uint64_t seed);

namespace {

using planted::Fault;
using sdfast::launch;
template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using Bits = Array<uint16_t>;

// What a call lends to its kernels.
struct Lent {
  ~Lent() { simt::forget_tensors(); }
  template <typename T, typename U>
  const T* input(const Array<U>& array) const {
    simt::allow(array.data(), array.nbytes(), false);
    return reinterpret_cast<const T*>(array.data());
  }
  template <typename T>
  T* output(Array<T>& array) const {
    simt::allow(array.data(), array.nbytes(), true);
    return array.mutable_data();
  }
};

void reverse(const Array<float>& x, Array<float>& y, int fault) {
  const Lent lent;
  const int n = static_cast<int>(x.size());
  launch(planted::reverse, {dim3(n / planted::kThreads), dim3(planted::kThreads)}, nullptr,
         lent.input<float>(x), lent.output(y), n, static_cast<Fault>(fault));
}

void shuffle(const Array<float>& x, Array<float>& y) {
  const Lent lent;
  launch(planted::shuffle, {dim3(1), dim3(32)}, nullptr, lent.input<float>(x), lent.output(y));
}

template <typename T, typename Storage>
void multiply(const Array<Storage>& a, const Array<Storage>& b, const Array<float>& c,
              Array<float>& d) {
  const Lent lent;
  launch(planted::multiply<T>, {dim3(1), dim3(32)}, nullptr, lent.input<T>(a), lent.input<T>(b),
         lent.input<float>(c), lent.output(d));
}

void matrices(const Bits& x, Array<uint32_t>& y, bool transposed) {
  const Lent lent;
  launch(transposed ? planted::matrices<true> : planted::matrices<false>, {dim3(1), dim3(32)},
         nullptr, lent.input<__half>(x), lent.output(y));
}

void copy(const Array<float>& x, Array<float>& y, int fault) {
  const Lent lent;
  const unsigned blocks = static_cast<unsigned>(x.size()) / (4 * planted::kThreads);
  const size_t bytes = sdfast::SharedMemory::bytes<float>(4 * planted::kThreads);
  launch(planted::copy, {dim3(blocks), dim3(planted::kThreads), bytes}, nullptr,
         lent.input<float>(x), lent.output(y), static_cast<planted::CopyFault>(fault));
}

// `bytes`: of dynamic shared memory, fewer than `copy` takes.
void copy_with(const Array<float>& x, Array<float>& y, size_t bytes) {
  const Lent lent;
  launch(planted::copy, {dim3(1), dim3(planted::kThreads), bytes}, nullptr, lent.input<float>(x),
         lent.output(y), planted::CopyFault::kNone);
}

void cluster_sum(const Array<float>& x, Array<float>& y, unsigned cluster, int fault) {
  const Lent lent;
  launch(planted::cluster_sum, {dim3(static_cast<unsigned>(x.size())), dim3(32), 0, cluster},
         nullptr, lent.input<float>(x), lent.output(y), cluster,
         static_cast<planted::ClusterFault>(fault));
}

void grid_sum(const Array<float>& x, Array<float>& partial, Array<unsigned>& counter,
              Array<float>& y, int fault) {
  const Lent lent;
  launch(planted::grid_sum, {dim3(static_cast<unsigned>(x.size())), dim3(32)}, nullptr,
         lent.input<float>(x), lent.output(partial), lent.output(counter), lent.output(y),
         static_cast<planted::GridFault>(fault));
}

// x: (64, K), w: (80, K) in bf16, a multiple of 64 of them.
void tile_products(const Bits& x, const Bits& w, Array<float>& y, int fault) {
  const Lent lent;
  const int64_t k = x.shape(1);
  const auto map = [&](const Bits& matrix) {
    const int rows = static_cast<int>(matrix.shape(0));
    return sdfast::tensor_map<__nv_bfloat16>(
        {lent.input<__nv_bfloat16>(matrix), 3, {k, rows, 1}, {1, k, k * rows}, {64, rows, 1}});
  };
  const size_t bytes =
      (64 + 80) * sdfast::kTileRowBytes + 2 * sdfast::SharedMemory::bytes<uint64_t>(1);
  launch(planted::tile_products, {dim3(1), dim3(sdfast::kWarpgroup), bytes}, nullptr, map(x),
         map(w), lent.output(y), static_cast<int>(k / 64), static_cast<planted::TileFault>(fault));
}

}  // namespace

PYBIND11_MODULE(simt_planted, module) {
  module.def("seed", &simt_seed);
  module.def("reverse", &reverse);
  module.def("shuffle", &shuffle);
  module.def("multiply_half", &multiply<__half, uint16_t>);
  module.def("multiply_bfloat16", &multiply<__nv_bfloat16, uint16_t>);
  module.def("multiply_tf32", &multiply<float, float>);
  module.def("matrices", &matrices);
  module.def("copy", &copy);
  module.def("copy_with", &copy_with);
  module.def("cluster_sum", &cluster_sum);
  module.def("grid_sum", &grid_sum);
  module.def("tile_products", &tile_products);
}
