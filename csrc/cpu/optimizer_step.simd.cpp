// The optimizers' loops, compiled once for each instruction set (isa.h).
//
// AdamW reads p, g, m, v and writes p, m, v: 7 * sizeof(T) bytes an element; SGDW with momentum 5,
// without 3; amsgrad, an EMA and Kahan's compensation add two each. In place, so nothing is there
// to stream.
//
// A tile at a time, in the compute type: float and double where they lie, narrower types by way of
// a buffer in the first-level cache. The options that come after the update (l1, EMA, rounding) are
// loops of their own over the tile, which is still there.
#include "optimizer_step.h"

#include "narrow.h"
#include "random.h"
#include "reg_kernels/optimizer_step_math.h"
#include "stream.h"

RK_NAMESPACE_BEGIN
namespace {

// A tile of an array of any type, as C: the array's own memory where that is its type.
template <typename C>
class TileOf {
 public:
  void open(void* array, DType dtype, int64_t first, int64_t count) {
    array_ = array;
    dtype_ = dtype;
    first_ = first;
    count_ = count;
    if (array == nullptr) {
      values_ = nullptr;
    } else if (is_own()) {
      values_ = static_cast<C*>(array) + first;
    } else {
      values_ = buffer_;
      if constexpr (sizeof(C) == sizeof(float)) {
        if (dtype == DType::float16) {
          widen(static_cast<float16*>(array) + first, count, buffer_, NothingAhead{});
        } else {
          widen(static_cast<bfloat16*>(array) + first, count, buffer_, NothingAhead{});
        }
      }
    }
  }

  // Stores what was changed.
  void close() {
    if (array_ == nullptr || is_own()) return;
    if constexpr (sizeof(C) == sizeof(float)) {
      if (dtype_ == DType::float16) {
        narrow(buffer_, count_, static_cast<float16*>(array_) + first_, false, NothingAhead{});
      } else {
        narrow(buffer_, count_, static_cast<bfloat16*>(array_) + first_, false, NothingAhead{});
      }
    }
  }

  C* values() const { return values_; }

 private:
  bool is_own() const {
    return dtype_ == (sizeof(C) == sizeof(double) ? DType::float64 : DType::float32);
  }

  void* array_;
  DType dtype_;
  int64_t first_, count_;
  C* values_;
  alignas(kLine) C buffer_[kDrawTile];
};

// f(i) for the elements of a tile. Nothing is asked for ahead: with three or four streams at once
// the hardware does better by itself (bench/NOTES.md).
template <typename F>
RK_HD void for_tile(int64_t count, const F& f) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) f(i);
}

template <typename C>
struct Tiles {
  TileOf<C> param, grad, first_moment, second_moment, max_second_moment, ema, compensation;
};

template <bool kCoupled, bool kAmsgrad, typename C>
void adam_tile(const OptimizerRule<C>& constants, const Tiles<C>& tiles, int64_t count) {
  const OptimizerRule<C> rule = constants;  // a copy that no store can be thought to change
  C* p = tiles.param.values();
  const C* g = tiles.grad.values();
  C* m = tiles.first_moment.values();
  C* v = tiles.second_moment.values();
  C* v_max = tiles.max_second_moment.values();
  for_tile(count, [=](int64_t i) __attribute__((always_inline)) {
    C unused{};
    adam_element<kCoupled, kAmsgrad>(rule, p[i], g[i], m[i], v[i], kAmsgrad ? v_max[i] : unused);
  });
}

template <bool kCoupled, bool kMomentum, typename C>
void sgd_tile(const OptimizerRule<C>& constants, const Tiles<C>& tiles, int64_t count) {
  const OptimizerRule<C> rule = constants;
  C* p = tiles.param.values();
  const C* g = tiles.grad.values();
  C* m = tiles.first_moment.values();
  for_tile(count, [=](int64_t i) __attribute__((always_inline)) {
    C unused{};
    sgd_element<kCoupled, kMomentum>(rule, p[i], g[i], kMomentum ? m[i] : unused);
  });
}

template <typename C>
void update_tile(const OptimizerTask& task, const OptimizerRule<C>& rule, const Tiles<C>& tiles,
                 int64_t count) {
  if (task.algorithm == Algorithm::adam) {
    const bool amsgrad = task.max_second_moment != nullptr;
    const auto update = task.coupled
                            ? (amsgrad ? adam_tile<true, true, C> : adam_tile<true, false, C>)
                            : (amsgrad ? adam_tile<false, true, C> : adam_tile<false, false, C>);
    update(rule, tiles, count);
  } else {
    const bool momentum = task.first_moment != nullptr;
    const auto update = task.coupled
                            ? (momentum ? sgd_tile<true, true, C> : sgd_tile<true, false, C>)
                            : (momentum ? sgd_tile<false, true, C> : sgd_tile<false, false, C>);
    update(rule, tiles, count);
  }
  C* p = tiles.param.values();
  if (task.constants.threshold > 0) {
    const C threshold = rule.threshold;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) p[j] = soft_threshold(p[j], threshold);
  }
  if (C* ema = tiles.ema.values()) {
    const OptimizerRule<C> of_ema = rule;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) ema[j] = ema_element(of_ema, ema[j], p[j]);
  }
}

template <typename C>
void run(const OptimizerTask& task, int64_t begin, int64_t end) {
  const OptimizerRule<C> rule(task.constants, task.algorithm);
  const RngStream rng(kRoundingTag, task.seed, task.offset);
  const DType own = sizeof(C) == sizeof(double) ? DType::float64 : DType::float32;
  const bool stochastic = task.rounding == Rounding::stochastic && task.dtype == DType::bfloat16;
  Tiles<C> tiles;
  Draws draws;
  // One loop over it all where nothing needs the tile again.
  const bool at_once = task.dtype == own && task.moments_dtype == own && task.ema == nullptr &&
                       task.compensation == nullptr && !(task.constants.threshold > 0);
  const int64_t tile = at_once ? end - begin : kDrawTile;
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t count = tile < end - first ? tile : end - first;
    tiles.param.open(task.param, task.dtype, first, count);
    tiles.grad.open(const_cast<void*>(task.grad), task.dtype, first, count);
    tiles.first_moment.open(task.first_moment, task.moments_dtype, first, count);
    tiles.second_moment.open(task.second_moment, task.moments_dtype, first, count);
    tiles.max_second_moment.open(task.max_second_moment, task.moments_dtype, first, count);
    tiles.ema.open(task.ema, own, first, count);
    tiles.compensation.open(task.compensation, task.dtype, first, count);
    C* p = tiles.param.values();
    // What rounding took off the parameter so far is still part of it.
    C* lost = tiles.compensation.values();
    if (lost) {
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) p[j] += lost[j];
    }
    update_tile(task, rule, tiles, count);
    if constexpr (sizeof(C) == sizeof(float)) {
      if (stochastic) {
        auto* to = static_cast<bfloat16*>(task.param) + first;
        for (int64_t done = 0; done < count;) {
          const int64_t part = task.places.together(first + done, count - done);
          const uint16_t* half_words = draws.fill(rng, task.places.of(first + done), part);
          const C* from = p + done;
#pragma omp simd
          for (int64_t j = 0; j < part; ++j) {
            to[done + j] = store_stochastic(from[j], half_words[j]);
          }
          done += part;
        }
      }
    }
    if (!stochastic) tiles.param.close();
    if (lost) {
      alignas(kLine) C exact[kDrawTile];
      memcpy(exact, p, count * sizeof(C));
      tiles.param.open(task.param, task.dtype, first, count);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) lost[j] = lost_by_rounding(exact[j], p[j]);
      tiles.compensation.close();
    }
    tiles.first_moment.close();
    tiles.second_moment.close();
    tiles.max_second_moment.close();
  }
}

// Reads p and the EMA and writes the EMA, which lies in its compute type.
template <typename C>
void average(const OptimizerTask& task, int64_t begin, int64_t end) {
  const OptimizerRule<C> rule(task.constants, task.algorithm);
  TileOf<C> param;
  C* ema = static_cast<C*>(task.ema);
  if (ema == nullptr) return;
  for (int64_t first = begin; first < end; first += kDrawTile) {
    const int64_t count = kDrawTile < end - first ? kDrawTile : end - first;
    param.open(task.param, task.dtype, first, count);
    const C* p = param.values();
    C* e = ema + first;
    for_tile(count, [=](int64_t i)
                        __attribute__((always_inline)) { e[i] = ema_element(rule, e[i], p[i]); });
  }
}

}  // namespace

void optimizer_step_range(const OptimizerTask& task, int64_t begin, int64_t end) {
  if (task.algorithm == Algorithm::average) {
    (task.dtype == DType::float64 ? average<double> : average<float>)(task, begin, end);
  } else {
    (task.dtype == DType::float64 ? run<double> : run<float>)(task, begin, end);
  }
}

RK_NAMESPACE_END
