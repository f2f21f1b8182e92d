// From copies to tasks: which bytes are read by which request, in which order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "box/box.h"
#include "io/file.h"

namespace dcp_fast::transfer {

// A part of a box that is small enough for one task.
struct Piece {
  size_t file = 0;
  int64_t source = 0;  // of the first byte, in the file
  std::byte* destination = nullptr;
  size_t item = 0;  // for error messages
  box::Loops loops;
  bool owns_pages = false;  // the rest of the pages that its destination touches may be overwritten
};

// One unit of work: a single piece, or neighbours that one request brings.
struct Task {
  size_t file = 0;
  size_t first_piece = 0;
  size_t pieces = 0;
};

struct Schedule {
  std::vector<Piece> pieces;
  std::vector<Task> tasks;
};

// How the boxes of one file are read.
//
// For strided boxes no fixed over-read ratio is right: reading runs one by one costs a request each, reading through
// costs the gaps. So each loop of a box decides by comparing its gap with what a request costs, in bytes.
struct Policy {
  int64_t request_cost = 0;
  int64_t block_bytes = 0;  // the most that one request reads
  bool direct_io = false;   // every read goes through staging
  // Likewise of a contiguous box. More than a block where that is read straight into place, as into a slot: blocks are
  // small where many threads share the memory that other boxes pass through.
  int64_t run_bytes = 0;

  // Whether loops[level..] are read as one span, gaps included.
  bool reads_through(const box::Loops& loops, size_t level) const;
};

// Splits boxes into pieces of at most a block, which ascend by file and offset.
std::vector<Piece> split_boxes(const std::vector<Piece>& boxes, const std::vector<Policy>& policies);

// Makes tasks of such pieces, in the same order: small neighbours share one.
Schedule join_pieces(std::vector<Piece> pieces, const std::vector<Policy>& policies);

}  // namespace dcp_fast::transfer
