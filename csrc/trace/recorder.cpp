#include "trace/recorder.h"

#include <algorithm>
#include <exception>

namespace dcp_fast::trace {

Track Recorder::track(const std::string& name) {
  const std::scoped_lock lock(mutex_);
  const auto found = std::find(tracks_.begin(), tracks_.end(), name);
  if (found != tracks_.end()) return static_cast<Track>(found - tracks_.begin());
  tracks_.push_back(name);
  return tracks_.size() - 1;
}

Track Recorder::thread_track() {
  const std::scoped_lock lock(mutex_);
  return find_thread_track();
}

const char* Recorder::keep(const std::string& name) {
  const std::scoped_lock lock(mutex_);
  return strings_.insert(name).first->c_str();
}

// Returns the track of this thread, or the lowest one that no other thread has. A thread that ended without a
// ThreadScope leaves its track to the next thread with its id.
Track Recorder::find_thread_track() {
  const auto known = threads_.find(std::this_thread::get_id());
  if (known != threads_.end()) return known->second;
  const auto taken = [this](Track track) {
    return std::any_of(threads_.begin(), threads_.end(), [track](const auto& entry) { return entry.second == track; });
  };
  const auto free = std::find_if_not(thread_tracks_.begin(), thread_tracks_.end(), taken);
  Track track = 0;
  if (free != thread_tracks_.end()) {
    track = *free;
  } else {
    track = tracks_.size();
    thread_tracks_.reserve(thread_tracks_.size() + 1);
    tracks_.push_back("reader " + std::to_string(thread_tracks_.size() + 1));
    thread_tracks_.push_back(track);
  }
  threads_.emplace(std::this_thread::get_id(), track);
  return track;
}

void Recorder::release_thread_track() noexcept {
  const std::scoped_lock lock(mutex_);
  threads_.erase(std::this_thread::get_id());
}

void Recorder::append(Track track, const char* name, int64_t begin, int64_t end, Arguments arguments) {
  if (arguments.path != nullptr) arguments.path = &*strings_.insert(*arguments.path).first;
  events_.push_back({track, name, begin, end, arguments});
}

void Recorder::add(Track track, const char* name, int64_t begin, int64_t end, const Arguments& arguments) noexcept {
  try {
    const std::scoped_lock lock(mutex_);
    append(track, name, begin, end, arguments);
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): the load matters more than its trace
  }
}

void Recorder::add_here(const char* name, int64_t begin, int64_t end, const Arguments& arguments) noexcept {
  try {
    const std::scoped_lock lock(mutex_);
    append(find_thread_track(), name, begin, end, arguments);
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): as above
  }
}

std::vector<Event> Recorder::events() const {
  const std::scoped_lock lock(mutex_);
  return events_;
}

std::vector<std::string> Recorder::tracks() const {
  const std::scoped_lock lock(mutex_);
  return tracks_;
}

}  // namespace dcp_fast::trace
