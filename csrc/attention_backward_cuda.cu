// The tensors of attention's CUDA kernels, backward.
#include <tuple>

#include "attention_backward_cuda.cuh"
#include "attention_tensors_cuda.h"

namespace sdfast {
namespace {

using attention::Input;
using attention::Sizes;

// do, o, q: (B, heads, L, D). k, v: (B, heads, S, D). lse: (B, heads, L), fp32, base 2. Returns dq,
// dk, dv, each a view of (B, rows, heads, D).
std::tuple<Tensor, Tensor, Tensor> attention_backward_cuda(Tensor d_o, Tensor q, Tensor k, Tensor v,
                                                           Tensor o, Tensor lse, bool is_causal,
                                                           double scale) {
  const Call guard(q);
  const Sizes sizes(q, k);
  const ScalarType dtype = q.scalar_type();
  const Device device = current_device();
  STD_TORCH_CHECK(device.capability >= 80, "attention: expected a GPU of capability 8.0 or later");
  STD_TORCH_CHECK(sizes.dim <= attention::kWidest, "q: expected at most ", attention::kWidest,
                  " elements of a head");
  STD_TORCH_CHECK(q.numel() > 0 && k.numel() > 0, "q, k: expected elements");
  Tensor dq = attention::new_by_token(sizes, sizes.queries, dtype),
         dk = attention::new_by_token(sizes, sizes.keys, dtype),
         dv = attention::new_by_token(sizes, sizes.keys, dtype);
  const Values saved_lse(guard, lse, "lse", {sizes.batch, sizes.heads, sizes.queries});
  Tensor delta = empty({sizes.batch, sizes.heads, sizes.queries}, ScalarType::Float);
  attention::with_half_type(dtype, [&](auto element) {
    using T = decltype(element);
    const Input<T> d_outputs(guard, d_o, "do", sizes, sizes.queries, dtype),
        outputs(guard, o, "o", sizes, sizes.queries, dtype),
        queries(guard, q, "q", sizes, sizes.queries, dtype),
        keys(guard, k, "k", sizes, sizes.keys, dtype),
        values(guard, v, "v", sizes, sizes.keys, dtype);
    attention::Pass<T> pass = {};
    pass.batch = sizes.batch, pass.heads = sizes.heads;
    pass.dim = ceil_div(sizes.dim, 8) * 8, pass.out_dim = sizes.dim;
    pass.scale = static_cast<float>(scale), pass.is_causal = is_causal;
    pass.lse = saved_lse.data(), pass.delta = guard.output<float>(delta);
    launch(attention::attention_delta_kernel<T>,
           {dim3(attention::row_blocks(sizes.queries, pass.all_heads())),
            dim3(attention::kRowThreads)},
           guard.stream(), d_outputs.rows(), outputs.rows(), guard.output<float>(delta), pass.heads,
           static_cast<int>(sizes.queries), pass.dim);

    // The results of splits live as long as the kernels that use them, in the stream's order.
    const auto run = [&](auto of_keys) {
      attention::plan(pass, device);
      std::optional<Tensor> partial;
      if (pass.splits > 1) {
        partial = empty({(of_keys ? 2 : 1) * pass.splits, pass.all_heads(), pass.rows, pass.dim},
                        ScalarType::Float);
        pass.partial = guard.output<float>(*partial);
      }
      attention::run<decltype(of_keys)::value>(pass, guard.stream());
    };
    pass.a = keys.rows(), pass.b = values.rows();
    pass.x = queries.rows(), pass.y = d_outputs.rows();
    pass.da = attention::output<T>(guard, dk), pass.db = attention::output<T>(guard, dv);
    pass.rows = sizes.keys, pass.others = sizes.queries;
    run(std::true_type());
    std::swap(pass.a, pass.x);
    std::swap(pass.b, pass.y);
    pass.da = attention::output<T>(guard, dq);
    pass.rows = sizes.queries, pass.others = sizes.keys;
    run(std::false_type());
  });
  return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("attention_backward_cuda", TORCH_BOX(&attention_backward_cuda));
}

}  // namespace
}  // namespace sdfast
