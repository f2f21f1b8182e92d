// Records what happened when during a load: spans of time on tracks, one track for each thread that records and one for
// each name that somebody asks for, such as a CUDA stream. dcp_fast/observe/trace.py writes them to a file.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace dcp_fast::trace {

using Clock = std::chrono::steady_clock;
using Track = size_t;

inline constexpr int64_t kNone = -1;

// What a span was about, as far as that is known.
struct Arguments {
  int64_t bytes = kNone;
  int64_t offset = kNone;             // in the file
  const std::string* path = nullptr;  // copied by the recorder
};

struct Event {
  Track track = 0;
  const char* name = nullptr;
  int64_t begin = 0;  // nanoseconds since the recorder was made
  int64_t end = 0;
  Arguments arguments;
};

// Thread-safe. Who may have to record holds a pointer to one; while that is null, recording costs nothing.
class Recorder {
 public:
  Recorder() : start_(Clock::now()) {}

  int64_t now() const { return at(Clock::now()); }
  int64_t at(Clock::time_point time) const {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time - start_).count();
  }

  // The track of that name, which is made when it is first asked for. Throws std::bad_alloc, as do the next two.
  Track track(const std::string& name);
  // The calling thread's track: "reader 1" is that of the first thread which asks.
  Track thread_track();
  // A copy of a name that lives as long as the recorder.
  const char* keep(const std::string& name);

  // `name` must outlive the recorder. Never throws, as destructors call it: where there is no memory for an event, it
  // is lost.
  void add(Track track, const char* name, int64_t begin, int64_t end, const Arguments& arguments = {}) noexcept;
  // The same on the track of the calling thread.
  void add_here(const char* name, int64_t begin, int64_t end, const Arguments& arguments = {}) noexcept;

  // In the order in which they were added. Their pointers live as long as the recorder.
  std::vector<Event> events() const;
  std::vector<std::string> tracks() const;

 private:
  friend class ThreadScope;

  Track find_thread_track();
  void release_thread_track() noexcept;
  void append(Track track, const char* name, int64_t begin, int64_t end, Arguments arguments);

  const Clock::time_point start_;
  mutable std::mutex mutex_;
  std::vector<Event> events_;
  std::vector<std::string> tracks_;
  std::unordered_map<std::thread::id, Track> threads_;
  std::vector<Track> thread_tracks_;         // in ascending order of their numbers
  std::unordered_set<std::string> strings_;  // its elements stay where they are
};

// Lends a track to the calling thread, and frees it at its end. So the threads of several pools, one after another,
// share the same few tracks. Does nothing without a recorder.
class ThreadScope {
 public:
  explicit ThreadScope(Recorder* recorder) : recorder_(recorder) {
    if (recorder_ != nullptr) recorder_->thread_track();
  }
  ~ThreadScope() {
    if (recorder_ != nullptr) recorder_->release_thread_track();
  }
  ThreadScope(const ThreadScope&) = delete;
  ThreadScope& operator=(const ThreadScope&) = delete;

 private:
  Recorder* recorder_;
};

// The time from its making to its end, on the track of the calling thread. Does nothing without a recorder.
class Span {
 public:
  Span(Recorder* recorder, const char* name)
      : recorder_(recorder), name_(name), begin_(recorder != nullptr ? recorder->now() : 0) {}
  ~Span() {
    if (recorder_ != nullptr) recorder_->add_here(name_, begin_, recorder_->now(), arguments_);
  }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

  void add_bytes(int64_t bytes) { arguments_.bytes = (arguments_.bytes == kNone ? 0 : arguments_.bytes) + bytes; }

 private:
  Recorder* recorder_;
  const char* name_;
  int64_t begin_;
  Arguments arguments_;
};

}  // namespace dcp_fast::trace
