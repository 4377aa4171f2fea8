// Distillation's loops, compiled once for each instruction set (isa.h).
//
// Reads the logits of student and teacher and, where a gradient is wanted, writes it: as many bytes
// as the three have. A row's exponentials, of the student at temperature 1 and T and of the teacher
// at T, each relative to the largest logit of its block, stay in the second-level cache until the
// row's sums are known. Where the classes of a position are planes apart they are gathered to rows
// and their gradient is scattered: 16 positions share the lines that this touches.
#include "distillation.h"

#include "narrow.h"
#include "softmax_blocks.h"

RK_NAMESPACE_BEGIN
namespace {

// The three softmax of a position.
template <typename C>
struct Softmaxes {
  SoftmaxSum<C> student;       // at temperature 1
  SoftmaxSum<C> student_at_t;  // of the same largest logit
  SoftmaxSum<C> teacher;       // at T
};

// A row of logits, `at` elements into an array. Three exponentials are made of each, beside which
// to widen what is stored in 16 bits costs nothing: the loops are those of C alone.
template <typename C>
struct LogitsRow {
  const void* array;
  DType dtype;
  int64_t at;

  RK_HD const C* block(int64_t first, int64_t n, C* buffer) const {
    return read_as(array, dtype, at + first, n, buffer);
  }
  C one(int64_t i) const {
    return static_cast<C>(ChannelValues{const_cast<void*>(array), dtype}.at(at + i, 0.0));
  }

  RK_HD int64_t bytes(int64_t count) const {
    return count * (dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2);
  }
  RK_HD const char* address(int64_t i) const {
    return static_cast<const char*>(array) + bytes(at + i);
  }
};

template <typename C>
struct Distillation {
  const DistillationTask& task;
  const LossTask& loss;
  const int64_t classes;
  const C scale;  // 1 / T
  const C* const weight;
  // Of a row: exponentials of the student at 1 and at T and of the teacher, then the largest
  // logits of blocks of both.
  C* const e;
  C* const e_student;
  C* const e_teacher;
  C* const maxima;
  C* const teacher_maxima;
  // A position's logits and gradient, where they have to be gathered.
  C* const gathered;
  // A block of each, as it is computed with.
  alignas(64) C wide[kBlock];
  alignas(64) C wide_teacher[kBlock];
  alignas(64) C terms[kBlock];  // of the divergence

  explicit Distillation(const DistillationTask& task)
      : task(task),
        loss(task.loss),
        classes(task.loss.classes),
        scale(static_cast<C>(1.0 / task.temperature)),
        weight(static_cast<const C*>(task.loss.weight)),
        e(new C[6 * classes + 2 * most_blocks(classes)]),
        e_student(scale == 1 ? e : e + classes),
        e_teacher(e + 2 * classes),
        maxima(e + 6 * classes),
        teacher_maxima(maxima + most_blocks(classes)),
        gathered(e + 3 * classes) {}
  Distillation(const Distillation&) = delete;
  ~Distillation() { delete[] e; }

  C& stat(int64_t which, int64_t position) const {
    return static_cast<C*>(loss.stats)[which * loss.positions + position];
  }

  template <bool kBackward>
  void run(int64_t unit) {
    int64_t first = unit * loss.unit, last = first + loss.unit;
    if (!loss.classes_last) {
      const int64_t strips = ceil_div(loss.length, loss.unit);
      first = unit / strips * loss.length + unit % strips * loss.unit;
      last = first + loss.unit;
      const int64_t end = (unit / strips + 1) * loss.length;
      last = last < end ? last : end;
    }
    last = last < loss.positions ? last : loss.positions;
    for_dtype(loss.dtype, [&]<typename S>(S) {
      if constexpr (sizeof(compute_t<S>) == sizeof(C)) {
        double total = 0;
        for (int64_t position = first; position < last; ++position) {
          const double lost = loss.classes_last ? in_rows<kBackward, S>(position)
                                                : in_planes<kBackward, S>(position);
          if constexpr (!kBackward) {
            if (loss.losses) static_cast<C*>(loss.losses)[position] = static_cast<C>(lost);
            total += lost;
          }
        }
        if constexpr (!kBackward) loss.partials[unit] = total;
      }
    });
  }

 private:
  // S is the student's type in memory.
  template <bool kBackward, typename S>
  double in_rows(int64_t position) {
    const int64_t at = position * classes;
    S* y = loss.gradient ? static_cast<S*>(loss.gradient) + at : nullptr;
    return row<kBackward>(position, past_line<S>(at), {loss.x, loss.dtype, at},
                          {task.teacher, task.teacher_dtype, at}, y, loss.stream);
  }

  template <bool kBackward, typename S>
  double in_planes(int64_t position) {
    const int64_t length = loss.length;
    const int64_t at = position / length * classes * length + position % length;
    C *student = gathered, *teacher = gathered + classes, *y = gathered + 2 * classes;
    gather(loss.x, loss.dtype, at, student);
    gather(task.teacher, task.teacher_dtype, at, teacher);
    constexpr DType kOwn = sizeof(C) == sizeof(double) ? DType::float64 : DType::float32;
    const double lost = row<kBackward>(position, 0, {student, kOwn, 0}, {teacher, kOwn, 0},
                                       loss.gradient ? y : nullptr, false);
    if (loss.gradient) {
      S* gradient = static_cast<S*>(loss.gradient) + at;
      for (int64_t c = 0; c < classes; ++c) gradient[c * length] = store<S>(y[c]);
    }
    return lost;
  }

  // The classes of the position whose first logit is element `at`.
  void gather(const void* array, DType dtype, int64_t at, C* to) const {
    for_dtype(dtype, [&]<typename T>(T) {
      if constexpr (sizeof(compute_t<T>) == sizeof(C)) {
        const T* from = static_cast<const T*>(array) + at;
        for (int64_t c = 0; c < classes; ++c) to[c] = load(from[c * loss.length]);
      }
    });
  }

  // One position: logits x of the student and t of the teacher, and where its gradient goes, which
  // begins `past` a line's start.
  template <bool kBackward, typename Y>
  RK_STAGE double row(int64_t position, int64_t past, const LogitsRow<C>& x, const LogitsRow<C>& t,
                      Y* y, bool stream) {
    const auto terms =
        LabelTerms<C>::at(loss.labels, loss.totals, weight, loss.weight_sum, position);
    if constexpr (kBackward) {
      const Softmaxes<C> sums{{stat(0, position), stat(1, position)},
                              {stat(0, position), stat(2, position)},
                              {stat(3, position), stat(4, position)}};
      int64_t block = 0;
      for_blocks(past, classes, [&](int64_t first, int64_t n) {
        raise<false>(x.block(first, n, wide), t.block(first, n, wide_teacher), first, n,
                     sums.student.max, sums.teacher.max, block++);
      });
      const C grad = static_cast<const C*>(loss.grad_output)[position * loss.grad_stride];
      write(past, x, t, y, stream, terms, sums, grad);
      return 0;
    } else {
      Softmaxes<C> sums;
      double diverged = 0;
      Above above;
      sum(past, x, t, terms.smooths(), sums, diverged, above);
      stat(0, position) = sums.student.max;
      stat(1, position) = sums.student.sum;
      stat(2, position) = sums.student_at_t.sum;
      stat(3, position) = sums.teacher.max;
      stat(4, position) = sums.teacher.sum;
      if (y) write(past, x, t, y, stream, terms, sums, C(1));
      const C x_a = terms.a >= 0 ? x.one(terms.a) : C(0);
      const C x_b = terms.b >= 0 ? x.one(terms.b) : C(0);
      const double of_labels = terms.loss(sums.student, x_a, x_b, above.sum, loss.weight_sum);
      const double t_squared = task.temperature * task.temperature;
      return task.alpha * t_squared * loss.share * diverged + (1.0 - task.alpha) * of_labels;
    }
  }

  // Logits and the largest of them, and where their exponentials and terms of Z go to.
  struct Raised {
    const C *x, *t;
    C max, teacher_max;
    C *e, *e_student, *e_teacher, *terms;
  };

  static constexpr int64_t kVector = 16;

  // All three in one loop: what lies between a logit and its exponentials is in registers.
  template <bool kTerms>
  RK_STAGE static void raise_vectors(const Raised& to, int64_t vectors, C scale) {
#pragma omp simd
    for (int64_t i = 0; i < vectors * kVector; ++i) {
      const C above = to.x[i] - to.max;
      const C student_above = above * scale;
      const C teacher_above = (to.t[i] - to.teacher_max) * scale;
      const C weight = exponential_below(teacher_above);
      to.e[i] = exponential_below(above);
      to.e_student[i] = exponential_below(student_above);
      to.e_teacher[i] = weight;
      if constexpr (kTerms) to.terms[i] = divergence_term(weight, teacher_above, student_above);
    }
  }

  // What is left of a vector is filled up to one, as in `exponentials`.
  template <bool kTerms>
  void raise(const C* x, const C* t, int64_t first, int64_t n, C max, C teacher_max,
             int64_t block) {
    maxima[block] = max;
    teacher_maxima[block] = teacher_max;
    C* const to[] = {e + first, e_student + first, e_teacher + first, terms};
    raise_vectors<kTerms>({x, t, max, teacher_max, to[0], to[1], to[2], to[3]}, n / kVector, scale);
    const int64_t left = n % kVector, whole = n - left;
    if (left == 0) return;
    C last[6][kVector] = {};
    for (int64_t i = 0; i < left; ++i) {
      last[4][i] = x[whole + i];
      last[5][i] = t[whole + i];
    }
    raise_vectors<kTerms>({last[4], last[5], max, teacher_max, last[0], last[1], last[2], last[3]},
                          1, scale);
    for (int which = 0; which < 3 + kTerms; ++which) {
      for (int64_t i = 0; i < left; ++i) to[which][whole + i] = last[which][i];
    }
  }

  void sum(int64_t past, const LogitsRow<C>& x_row, const LogitsRow<C>& t_row, bool smooths,
           Softmaxes<C>& sums, double& diverged, Above& above) {
    C max = kLowest<C>, teacher_max = kLowest<C>;
    double student = 0, student_at_t = 0, teacher = 0, z = 0;
    int64_t block = 0;
    for_blocks(past, classes, [&](int64_t first, int64_t n) {
      prefetch(x_row.address(first) + kAhead, x_row.bytes(n));
      prefetch(t_row.address(first) + kAhead, t_row.bytes(n));
      const C* x = x_row.block(first, n, wide);
      const C* t = t_row.block(first, n, wide_teacher);
      const C own = largest<C>(x, n), teacher_own = largest<C>(t, n);
      if (block == 0) {
        max = own;
        teacher_max = teacher_own;
      }
      const C larger = own > max ? own : max;
      const C teacher_larger = teacher_own > teacher_max ? teacher_own : teacher_max;
      raise<true>(x, t, first, n, own, teacher_own, block++);

      student = student * factor_between(max, larger) +
                sum_of_values(e + first, n) * factor_between(own, larger);
      student_at_t = student_at_t * factor_between(max, larger, scale) +
                     sum_of_values(e_student + first, n) * factor_between(own, larger, scale);
      // Where a largest logit changes, every term of z changes by what it and the other have moved.
      const double part = sum_of_values(terms, n);
      const double part_sum = sum_of_values(e_teacher + first, n);
      const double moved = moved_by(teacher_max, teacher_larger, max, larger);
      const double part_moved = moved_by(teacher_own, teacher_larger, own, larger);
      const double factor = factor_between(teacher_max, teacher_larger, scale);
      const double part_factor = factor_between(teacher_own, teacher_larger, scale);
      z = factor * (z + (teacher != 0 ? teacher * moved : 0)) +
          part_factor * (part + (part_sum != 0 ? part_sum * part_moved : 0));
      teacher = teacher * factor + part_sum * part_factor;

      if (smooths) {
        above.add(Above::of(x, weight ? weight + first : nullptr, n, own), max, own, larger);
      }
      max = larger;
      teacher_max = teacher_larger;
    });
    sums.student = {max, static_cast<C>(student)};
    sums.student_at_t = {max, static_cast<C>(student_at_t)};
    sums.teacher = {teacher_max, static_cast<C>(teacher)};
    diverged = divergence(teacher, student_at_t, z);
  }

  double moved_by(C teacher_from, C teacher_to, C from, C to) const {
    return ((static_cast<double>(teacher_from) - teacher_to) - (static_cast<double>(from) - to)) /
           task.temperature;
  }

  // What makes softmax of the exponentials of a block.
  struct Factors {
    double own, student, teacher;
  };

  Factors factors_of(int64_t block, const Softmaxes<C>& sums) const {
    return {softmax_factor(maxima[block], sums.student),
            softmax_factor(maxima[block], sums.student_at_t, scale),
            softmax_factor(teacher_maxima[block], sums.teacher, scale)};
  }

  template <typename Y>
  void write(int64_t past, const LogitsRow<C>& x, const LogitsRow<C>& t, Y* y, bool stream,
             const LabelTerms<C>& terms, const Softmaxes<C>& sums, C grad) {
    const double of_labels = (1.0 - task.alpha) * grad;
    const double of_teacher = task.alpha * task.temperature * loss.share * grad;
    const C smooth = static_cast<C>(terms.smooth * of_labels);
    int64_t block = 0;
    for_blocks(past, classes, [&](int64_t first, int64_t n) {
      // The row that comes next; past the end of the tensor that asks for nothing.
      prefetch_row(x.address(classes + first), x.bytes(n));
      prefetch_row(t.address(classes + first), t.bytes(n));
      const Factors factors = factors_of(block++, sums);
      const C k = static_cast<C>(of_labels * terms.mass * factors.own);
      const C k_student = static_cast<C>(of_teacher * factors.student);
      const C k_teacher = static_cast<C>(of_teacher * factors.teacher);
      const C *own = e + first, *student = e_student + first, *teacher = e_teacher + first;
      if (weight && smooth != 0) {
        const C* w = weight + first;
        write_rounded(y + first, n, stream, wide, [=](int64_t i) RK_INLINE {
          return (student[i] * k_student - teacher[i] * k_teacher) + (own[i] * k - w[i] * smooth);
        });
      } else {
        write_rounded(y + first, n, stream, wide, [=](int64_t i) RK_INLINE {
          return (student[i] * k_student - teacher[i] * k_teacher) + (own[i] * k - smooth);
        });
      }
    });
    for (int which = 0; which < 2; ++which) {
      const int64_t label = which ? terms.b : terms.a;
      if (label < 0) continue;
      const Factors factors = factors_of(block_of(past, label), sums);
      const C p = e[label] * static_cast<C>(factors.own);
      const C slope = terms.slope_of_label(label, p, weight ? weight[label] : C(1));
      const C of_student = e_student[label] * static_cast<C>(factors.student);
      const C from_teacher = e_teacher[label] * static_cast<C>(factors.teacher);
      y[label] = store<Y>(static_cast<C>(of_teacher) * (of_student - from_teacher) +
                          static_cast<C>(of_labels) * slope);
    }
  }
};

template <bool kBackward, typename C>
void units_as(const DistillationTask& task, int64_t begin, int64_t end) {
  Distillation<C> distillation(task);
  for (int64_t unit = begin; unit < end; ++unit) distillation.template run<kBackward>(unit);
}

template <bool kBackward>
void units(const DistillationTask& task, int64_t begin, int64_t end) {
  const bool in_double = task.loss.dtype == DType::float64;
  (in_double ? units_as<kBackward, double> : units_as<kBackward, float>)(task, begin, end);
  if (task.loss.stream) stream_fence();
}

}  // namespace

void distillation_units(const DistillationTask& task, int64_t begin, int64_t end) {
  units<false>(task, begin, end);
}

void distillation_backward_units(const DistillationTask& task, int64_t begin, int64_t end) {
  units<true>(task, begin, end);
}

RK_NAMESPACE_END
