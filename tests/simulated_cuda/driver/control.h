// How tests steer the simulated driver and ask what it saw. A real driver has none of these functions: find them with
// dlsym or ctypes.
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// A host thread is about to write, or to read, memory that copies may use. `who` appears in reports.
void simcuda_host_write(const void* begin, size_t bytes, const char* who);
void simcuda_host_read(const void* begin, size_t bytes, const char* who);

// Changes how the machine behaves; 0 for a key that is unknown. README.md lists the keys.
int simcuda_set(const char* key, double value);

// The nth next call (1: the very next) of a function fails with this CUresult. Asynchronous: the call succeeds, and the
// work that it enqueued fails when it is executed, after which every call of the context returns the error.
void simcuda_fault(const char* function, int nth_from_now, int error, int asynchronous);

// How often a function was called so far; "" for all of them.
long simcuda_calls(const char* function);

// How many reports contain a text, and these, one a line, cut at the capacity. Clearing forgets all reports.
int simcuda_reports(const char* containing, char* buffer, int capacity, int clear);

// How many objects are alive, and what kinds they are: device memory, pinned memory, streams, events, modules,
// contexts.
int simcuda_leaks(char* buffer, int capacity);

// For how long the links to and from a device ("copy") were busy by the model, or kernels ran ("kernel").
double simcuda_busy_seconds(int device, const char* kind, int reset);

// A counter of a device, or the sum over all for -1. README.md lists the names; -1 for others.
long simcuda_statistic(const char* name, int device, int reset);

// Forgets failed contexts, reports, faults and counters. Objects, memory and settings stay.
void simcuda_reset(void);

// How many percent of the instructions of all kernels were executed so far, and the lines that never were.
int simcuda_kernel_coverage(char* buffer, int capacity);

#ifdef __cplusplus
}
#endif
