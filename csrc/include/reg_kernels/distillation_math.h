// Knowledge distillation at one position, for the CPU and the CUDA kernels.
//
// With the student's logits x, the teacher's t and p, q their softmax at temperature T:
//   loss = alpha T^2 KL(p || q) + (1 - alpha) CE(x)
//   KL = sum_c p_c (log p_c - log q_c) = Z / sum_t - log sum_t + log sum_q,
//   Z = sum_c e_c ((t_c - max_t) - (x_c - max_x)) / T,  e_c = exp((t_c - max_t) / T)
//   d loss / d x_c = alpha T (q_c - p_c) + (1 - alpha) d CE / d x_c
#pragma once

#include "cross_entropy_math.h"

RK_NAMESPACE_BEGIN

// A class that the teacher excludes, of logit -inf, counts for nothing in Z instead of 0 times
// infinity; one that the student alone excludes makes the divergence infinite, or NaN where the
// teacher excludes it as well: all as torch's kl_div.
template <typename C>
RK_HD C divergence_term(C e, C teacher_above, C student_above) {
  const C bounded = teacher_above < kLowest<C> ? kLowest<C> : teacher_above;
  return e * (bounded - student_above);
}

// KL of one position from the sums of teacher and student and Z, which is relative to the maxima of
// the two. At a high temperature it is a small difference, that the loss multiplies by T^2.
RK_HD double divergence(double teacher_sum, double student_sum, double z) {
  return z / teacher_sum - logarithm(teacher_sum / student_sum);
}

template <typename C>
RK_HD double divergence(const SoftmaxSum<C>& teacher, const SoftmaxSum<C>& student, double z) {
  return divergence(static_cast<double>(teacher.sum), static_cast<double>(student.sum), z);
}

RK_NAMESPACE_END
