// Copies from memory whose pages may vanish. Where a mapped file is cut short, or its device fails, there is no call
// that could return an error: the system sends SIGBUS to the thread that touches the page, which by default ends the
// process.
//
// A handler for SIGBUS is in place while at least one guarded copy goes on in this process, and only then. It ends the
// copy of the thread that it is called on if the system says that this thread touched one of the copy's own addresses.
// Every other SIGBUS goes to whoever was there before: a handler of somebody else, or the default action.
//
// What it does about others:
// - Somebody who replaces the handler meanwhile may call ours for ever. So theirs stays, ours hands on what comes, and
//   from the next copy on nothing is guarded any more in this process. Copies that are under way are not guarded
//   either: for as long as one block takes, a file that is cut short ends in their handler.
// - A child process begins with the handler that was there before, and with no copies.
// - A thread that blocks SIGBUS would be killed before any handler is called, so that it gets no guarded copies.
#pragma once

#include <cstddef>
#include <functional>

namespace dcp_fast::io {

struct MemoryRange {
  const std::byte* begin = nullptr;
  const std::byte* end = nullptr;

  bool holds(const void* address) const { return begin <= address && address < end; }
};

enum class GuardedCopy {
  kDone,
  kFaulted,  // a page of source or destination cannot be had; anything may have been copied
  kBlocked,  // nothing was done: this thread blocks SIGBUS
  kTaken,    // nothing was done: somebody else has replaced the handler
};

// Calls `copy`, which touches nothing but these two ranges and its own stack. It may be left at any instruction, so it
// consists of plain loops: nothing in it is allocated, locked or destroyed. Throws std::bad_alloc before it is called.
GuardedCopy copy_guarded(MemoryRange source, MemoryRange destination, const std::function<void()>& copy);

}  // namespace dcp_fast::io
