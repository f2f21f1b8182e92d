#include "transfer/slot_tasks.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "io/buffer.h"

namespace dcp_fast::transfer {

namespace {

// Changes loops so that they fill memory without gaps, in the order of the file.
void pack(box::Loops& loops) {
  int64_t stride = 1;
  for (auto loop = loops.rbegin(); loop != loops.rend(); ++loop) {
    loop->destination_stride = stride;
    stride *= loop->size;
  }
}

class TaskMaker {
 public:
  TaskMaker(int device, const std::vector<Policy>& policies, size_t slot_bytes, std::vector<SlotTask>& tasks)
      : device_(device), policies_(policies), packer_(slot_bytes), tasks_(tasks) {}

  void add(Piece piece) {
    const auto destination = reinterpret_cast<cuda::DeviceAddress>(piece.destination);
    std::optional<int64_t> page_position;
    piece.owns_pages =
        policies_[piece.file].whole_pages && piece.loops.size() == 1 && piece.loops[0].size >= cuda::kMinStraightBytes;
    if (piece.owns_pages) page_position = piece.source % static_cast<int64_t>(io::kPageBytes);
    if (!packer_.add(piece.loops, destination, page_position)) {
      finish();
      static_cast<void>(packer_.add(piece.loops, destination, page_position));  // an empty slot takes any piece
    }
    pack(piece.loops);
    pieces_.push_back(std::move(piece));
  }

  void finish() {
    if (packer_.empty()) return;
    SlotTask task;
    task.device = device_;
    task.plan = packer_.finish();
    for (size_t i = 0; i < pieces_.size(); ++i) {
      // NOLINTNEXTLINE(performance-no-int-to-ptr)
      pieces_[i].destination = reinterpret_cast<std::byte*>(uint64_t{task.plan.offsets[i]});
    }
    task.schedule = join_pieces(std::exchange(pieces_, {}), policies_);
    tasks_.push_back(std::move(task));
  }

 private:
  const int device_;
  const std::vector<Policy>& policies_;
  cuda::SlotPacker packer_;
  std::vector<Piece> pieces_;
  std::vector<SlotTask>& tasks_;
};

}  // namespace

void SlotTask::place_at(std::byte* slot) {
  for (Piece& piece : schedule.pieces) piece.destination = slot + reinterpret_cast<uint64_t>(piece.destination);
}

std::vector<SlotTask> make_slot_tasks(const std::map<int, std::vector<Piece>>& boxes,
                                      const std::vector<Policy>& policies, size_t slot_bytes) {
  std::vector<SlotTask> tasks;
  for (const auto& [device, of_device] : boxes) {
    TaskMaker maker(device, policies, slot_bytes, tasks);
    for (Piece& piece : split_boxes(of_device, policies)) maker.add(std::move(piece));
    maker.finish();
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const SlotTask& a, const SlotTask& b) {
    const Piece& first = a.schedule.pieces.front();
    const Piece& second = b.schedule.pieces.front();
    return std::tie(first.file, first.source) < std::tie(second.file, second.source);
  });
  return tasks;
}

}  // namespace dcp_fast::transfer
