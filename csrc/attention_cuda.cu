// The tensors of attention's CUDA kernels, forward.
#include <cmath>
#include <tuple>

#include "attention_cuda.cuh"
#include "attention_hopper_cuda.cuh"
#include "attention_tensors_cuda.h"

namespace sdfast {
namespace {

using attention::Sizes;

// o, and lse where it is asked for.
std::tuple<Tensor, std::optional<Tensor>> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 bool is_causal, double scale, bool with_lse) {
  const Call guard(q);
  const Sizes sizes(q, k);
  const ScalarType dtype = q.scalar_type();
  const Device device = current_device();
  STD_TORCH_CHECK(device.capability >= 80, "attention: expected a GPU of capability 8.0 or later");
  STD_TORCH_CHECK(sizes.dim <= attention::kWidest, "q: expected at most ", attention::kWidest,
                  " elements of a head");
  Tensor o = attention::new_by_token(sizes, sizes.queries, dtype);
  std::optional<Tensor> lse;
  if (with_lse) lse = empty({sizes.batch, sizes.heads, sizes.queries}, ScalarType::Float);
  attention::with_half_type(dtype, [&](auto element) {
    using T = decltype(element);
    const attention::Input<T> queries(guard, q, "q", sizes, sizes.queries, dtype),
        keys(guard, k, "k", sizes, sizes.keys, dtype),
        values(guard, v, "v", sizes, sizes.keys, dtype);
    if (o.numel() == 0) {
      if (lse) torch::stable::zero_(*lse);
      return;
    }
    STD_TORCH_CHECK(sizes.keys > 0, "k: expected at least one key");
    attention::Forward<T> call = {};
    call.q = queries.rows(), call.k = keys.rows(), call.v = values.rows();
    call.o = attention::output<T>(guard, o);
    if (lse) call.lse = guard.output<float>(*lse);
    call.batch = sizes.batch, call.heads = sizes.heads;
    call.queries = sizes.queries, call.keys = sizes.keys;
    call.dim = ceil_div(sizes.dim, 8) * 8, call.o_dim = sizes.dim;
    call.factor = static_cast<float>(std::abs(scale) * attention::kLog2E);
    call.negate = scale < 0, call.is_causal = is_causal;
    if (attention::suits_hopper(call, device)) {
      return call.dim <= 40 ? attention::attend_on_hopper<T, 40>(call, device, guard.stream())
                            : attention::attend_on_hopper<T, 64>(call, device, guard.stream());
    }
    const attention::Plan plan =
        attention::plan(call.all_heads(), call.queries, call.keys, call.dim, is_causal, device);
    call.splits = plan.splits, call.split_keys = plan.split_keys;
    Tensor partial, partial_lse;
    if (plan.splits > 1) {
      const int64_t rows = plan.splits * call.all_heads() * call.queries;
      partial = empty({rows, call.dim}, ScalarType::Float);
      partial_lse = empty({rows}, ScalarType::Float);
      call.partial = guard.output<float>(partial);
      call.partial_lse = guard.output<float>(partial_lse);
    }
    attention::attend(call, plan.rows, guard.stream());
  });
  return {o, lse};
}

// q: (B, heads, L, D). k, v: (B, heads, S, D). Returns a (B, heads, L, D) view of (B, L, heads, D).
Tensor attention_forward_cuda(Tensor q, Tensor k, Tensor v, bool is_causal, double scale) {
  return std::get<0>(attend(q, k, v, is_causal, scale, false));
}

// Returns that and the base-2 logarithm of each query's sum of exp(scale q k): (B, heads, L), fp32.
std::tuple<Tensor, Tensor> attention_with_lse_cuda(Tensor q, Tensor k, Tensor v, bool is_causal,
                                                   double scale) {
  auto [o, lse] = attend(q, k, v, is_causal, scale, true);
  return {o, *lse};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("attention_forward_cuda", TORCH_BOX(&attention_forward_cuda));
  m.impl("attention_with_lse_cuda", TORCH_BOX(&attention_with_lse_cuda));
}

}  // namespace
}  // namespace sdfast
