// For whoever loads libreg_kernels_cpu.so: which instruction set its kernels run, by name. In C,
// since Python reads them by ctypes as well.
#pragma once

#define RK_EXPORTED extern "C" __attribute__((visibility("default")))

// The one that the kernels run; null where this machine has none of those that they were built for.
RK_EXPORTED const char* reg_kernels_isa();

// Those that they were built for and this machine has, the least capable one first; null behind
// the last one.
RK_EXPORTED const char* reg_kernels_isa_at(int place);

// Has the kernels run the one of this name; 0 where it is none of those.
RK_EXPORTED int reg_kernels_set_isa(const char* name);
