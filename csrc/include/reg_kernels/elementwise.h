// The random elementwise family: ops that draw a number for each element, channel or sample, and
// make each element of the result of the one in its place.
//
// An op of the family is one header, elementwise/<op>.h, that is found by its place: setup.py
// compiles csrc/cpu/elementwise.cpp, elementwise.simd.cpp and csrc/cuda/elementwise.cu with it
// before them. It defines a struct, `using Op = ` that struct, and in it:
//   kTag           what its draws are told from others' by
//   kForms         the registered ops: names, and what one draw is for
//   kReadsDropped  whether an element that is dropped is read, and multiplied by 0
//   kAdds          whether a residual is added, in the same pass
//   element(x, scale), element(x, residual, scale)
//                  what becomes of an element that is kept, rounded once at the end. One that is
//                  dropped is as kept with a scale of 0 or, if it is not read, 0 or the residual.
#pragma once

#include "channel_layout.h"
#include "dropout_math.h"
#include "dtypes.h"
#include "philox.h"

RK_NAMESPACE_BEGIN

// What one draw is for, in storage order: an element; a channel of an (N, C, L); a sample, which
// is a channel of an (N, 1, L).
enum class DrawnFor { element, channel, sample };

struct Form {
  const char* name;
  const char* in_place;  // or null
  DrawnFor drawn_for;
};

template <typename Op>
constexpr bool has_form(DrawnFor drawn_for) {
  for (const Form& form : Op::kForms) {
    if (form.drawn_for == drawn_for) return true;
  }
  return false;
}

RK_NAMESPACE_END
