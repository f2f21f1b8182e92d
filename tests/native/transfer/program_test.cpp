#include "transfer/program.h"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "checkpoint_files.h"
#include "doctest/doctest.h"
#include "error.h"

using namespace dcp_fast;
using namespace dcp_fast::testing;
using transfer::Destination;
using transfer::Item;
using transfer::Layouts;
using transfer::Program;
using Kind = transfer::Transfer::Kind;

namespace {

constexpr checkpoint::DType kFloat = 0;
constexpr checkpoint::DType kDouble = 1;

// Layouts of tensors whose payloads begin 100 bytes into records of 1000 bytes each, all in files of their own.
Layouts layouts_of(const std::vector<Ints>& sizes, const std::vector<Ints>& strides = {}) {
  Layouts layouts;
  for (size_t i = 0; i < sizes.size(); ++i) {
    transfer::Record record;
    record.file = i;
    record.offset = 5000;
    record.length = 1000;
    layouts.sources.push_back(std::make_unique<io::File>("file" + std::to_string(i)));
    layouts.records.push_back(record);
    checkpoint::ParsedRecord parsed;
    parsed.status = checkpoint::ParsedRecord::Status::kTensor;
    parsed.layout.dtype = kFloat;
    parsed.layout.begin = 100;
    parsed.layout.sizes = sizes[i];
    parsed.layout.strides = strides.empty() ? contiguous_strides(sizes[i]) : strides[i];
    layouts.parsed.push_back(parsed);
  }
  return layouts;
}

Destination destination_of(std::string& memory, const Ints& sizes, const Ints& strides) {
  Destination destination;
  memory.resize(std::max<size_t>(memory.size(), static_cast<size_t>(span_of(sizes, strides) * 4)));
  destination.data = reinterpret_cast<std::byte*>(memory.data());
  destination.device = transfer::kHost;
  destination.dtype = kFloat;
  destination.sizes = sizes;
  destination.strides = strides;
  return destination;
}

Item item_of(const Ints& storage_offsets, const Ints& destination_offsets, const Ints& lengths, size_t record = 0,
             size_t destination = 0) {
  Item item;
  item.record = record;
  item.destination = destination;
  item.storage_offsets = storage_offsets;
  item.destination_offsets = destination_offsets;
  item.lengths = lengths;
  return item;
}

std::optional<Error> error_of(const Layouts& layouts, const std::vector<Item>& items,
                              const std::vector<Destination>& destinations) {
  try {
    const Program program(layouts, items, destinations);
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

}  // namespace

TEST_CASE("a box is narrowed on both sides and becomes a direct copy") {
  std::string memory;
  const Layouts layouts = layouts_of({{4, 6}});
  const auto destination = destination_of(memory, {3, 5}, {5, 1});
  const Program program(layouts, {item_of({1, 2}, {0, 1}, {2, 3})}, {destination});
  const transfer::Transfer& transfer = program.transfers()[0];
  CHECK(transfer.kind == Kind::kDirect);
  CHECK(transfer.source == 5000 + 100 + (1 * 6 + 2) * 4);
  CHECK(transfer.destination == destination.data + 1 * 4);
  CHECK(transfer.loops == box::Loops{{2, 24, 20}, {12, 1, 1}});
  CHECK(program.bytes_needed() == 24);
  CHECK(program.waves() == 1);
}

TEST_CASE("lengths narrow as torch's narrow_tensor_by_index does") {
  std::string memory;
  const auto destination = destination_of(memory, {4, 6}, {6, 1});
  const Layouts layouts = layouts_of({{4, 6}});
  // A length that is not smaller than its dimension leaves it whole, whatever the offset says.
  const Program whole(layouts, {item_of({3, 9}, {2, 7}, {4, 60})}, {destination});
  CHECK(whole.transfers()[0].source == 5100);
  CHECK(whole.transfers()[0].loops == box::Loops{{96, 1, 1}});
  CHECK(whole.items()[0].lengths == Ints{4, 6});
  // Dimensions without a length stay whole.
  const Program rows(layouts, {item_of({2}, {1}, {2})}, {destination});
  CHECK(rows.transfers()[0].source == 5100 + 48);
  CHECK(rows.transfers()[0].destination == destination.data + 24);
  CHECK(rows.items()[0].lengths == Ints{2, 6});
  CHECK(rows.bytes_needed() == 48);
  const Program empty(layouts, {item_of({4, 0}, {0, 0}, {0, 6})}, {destination});
  CHECK(empty.transfers()[0].loops.empty());
  CHECK(empty.bytes_needed() == 0);
}

TEST_CASE("boxes that do not fit are errors that say which") {
  std::string memory;
  const Layouts layouts = layouts_of({{4, 6}, {4, 6}});
  const auto destination = destination_of(memory, {4, 6}, {6, 1});
  const auto wrong = [&](const Item& item, const std::string& message) {
    const auto error = error_of(layouts, {item_of({0, 0}, {0, 0}, {1, 1}), item}, {destination});
    REQUIRE(error.has_value());
    CHECK(error->kind == ErrorKind::kSizeMismatch);
    CHECK(error->item == 1);
    CHECK(error->record == 1);
    CHECK(error->path == "file1");
    CHECK(error->offset == 5000);
    CHECK(error->length == 1000);
    CHECK(std::string(error->what()).find(message) != std::string::npos);
  };
  wrong(item_of({3, 0}, {0, 0}, {2, 6}, 1), "exceeds the stored tensor of sizes [4, 6]");
  wrong(item_of({0, 0}, {3, 0}, {2, 6}, 1), "exceeds the destination of sizes [4, 6]");
  wrong(item_of({-1, 0}, {0, 0}, {2, 6}, 1), "exceeds the stored tensor");
  wrong(item_of({0, 0}, {0, 0}, {-1, 6}, 1), "exceeds the destination");
  wrong(item_of({INT64_MAX, 0}, {0, 0}, {2, 6}, 1), "exceeds the stored tensor");
  wrong(item_of({0, 0, 0}, {0, 0, 0}, {1, 1, 1}, 1), "3 dimensions");
  const Layouts other = layouts_of({{4, 6}, {4, 5}});
  const auto error = error_of(other, {item_of({0, 0}, {0, 0}, {4, 6}, 1)}, {destination});
  REQUIRE(error.has_value());
  CHECK(std::string(error->what()).find("[4, 6] of the destination vs [4, 5]") != std::string::npos);
  const Layouts scalar = layouts_of({{}});
  const auto scalars = error_of(scalar, {item_of({0}, {0}, {1})}, {destination_of(memory, {1}, {1})});
  REQUIRE(scalars.has_value());
  CHECK(scalars->kind == ErrorKind::kSizeMismatch);
}

TEST_CASE("what the engine cannot place itself is staged or left to torch") {
  std::string memory;
  const Item item = item_of({0, 0}, {0, 0}, {4, 6});
  const Layouts layouts = layouts_of({{4, 6}});
  const auto kind = [](const Layouts& from, const Item& box, const Destination& to) {
    return Program(from, {box}, {to}).transfers()[0].kind;
  };
  Destination destination = destination_of(memory, {4, 6}, {6, 1});
  CHECK(kind(layouts, item, destination) == Kind::kDirect);
  destination.dtype = checkpoint::dtype_by_name("int32");  // float to int is not defined for all numbers
  CHECK(kind(layouts, item, destination) == Kind::kConverted);
  destination.dtype = checkpoint::kUnknownDType;
  CHECK(kind(layouts, item, destination) == Kind::kConverted);
  destination.dtype = kFloat;
  destination.device = transfer::kElsewhere;
  CHECK(kind(layouts, item, destination) == Kind::kConverted);
  destination.data = nullptr;
  CHECK(kind(layouts, item, destination) == Kind::kConverted);
  CHECK(kind(layouts, item, destination_of(memory, {4, 6}, {0, 1})) == Kind::kConverted);
  CHECK(kind(layouts, item, destination_of(memory, {4, 6}, {3, 1})) == Kind::kConverted);
  CHECK(kind(layouts_of({{4, 6}}, {{0, 1}}), item, destination_of(memory, {4, 6}, {6, 1})) == Kind::kFallback);
  // Whoever reads it counts its bytes.
  const Layouts expanded = layouts_of({{4, 6}}, {{0, 1}});
  CHECK(Program(expanded, {item}, {destination_of(memory, {4, 6}, {6, 1})}).bytes_needed() == 0);
  Layouts unknown = layouts_of({{4, 6}});
  unknown.parsed[0].status = checkpoint::ParsedRecord::Status::kUnknown;
  const Program program(unknown, {item}, {destination_of(memory, {4, 6}, {6, 1})});
  CHECK(program.transfers()[0].kind == Kind::kFallback);
  CHECK(program.bytes_needed() == 0);
  // One row of an expanded tensor is an ordinary box.
  CHECK(kind(layouts_of({{4, 6}}, {{0, 1}}), item_of({2, 0}, {1, 0}, {1, 6}), destination_of(memory, {4, 6}, {6, 1})) ==
        Kind::kDirect);
}

TEST_CASE("another dtype is converted on the way to the host, and on devices by torch") {
  std::string memory;
  const Layouts layouts = layouts_of({{4, 6}});
  Destination destination = destination_of(memory, {4, 12}, {12, 2});
  destination.dtype = kDouble;
  const Program program(layouts, {item_of({1, 2}, {2, 3}, {2, 4})}, {destination});
  const transfer::Transfer& transfer = program.transfers()[0];
  CHECK(transfer.kind == Kind::kDirect);
  REQUIRE(transfer.conversion.has_value());
  CHECK(transfer.conversion->from_bytes == 4);
  CHECK(transfer.conversion->to_bytes == 8);
  CHECK(transfer.source == 5000 + 100 + (6 + 2) * 4);
  CHECK(transfer.destination == destination.data + (2 * 12 + 3 * 2) * 8);
  CHECK(transfer.loops == box::Loops{{2, 24, 96}, {4, 4, 16}, {4, 1, 1}});
  CHECK(program.bytes_needed() == 2 * 4 * 4);
  destination.device = 0;
  const Program on_device(layouts, {item_of({1, 2}, {2, 3}, {2, 4})}, {destination});
  CHECK(on_device.transfers()[0].kind == Kind::kConverted);
  CHECK(on_device.transfers()[0].loops.empty());
  destination.device = transfer::kHost;
  destination.strides = {12, 0};
  CHECK(Program(layouts, {item_of({1, 2}, {2, 3}, {2, 4})}, {destination}).transfers()[0].kind == Kind::kConverted);
}

TEST_CASE("NaNs of bfloat16 are those of torch's vector loops where its innermost loop is contiguous") {
  std::string memory;
  const auto nan = [&](const Ints& lengths, const Ints& from_strides, const Ints& to_strides) {
    Destination destination = destination_of(memory, lengths, to_strides);
    destination.dtype = checkpoint::dtype_by_name("bfloat16");
    const Program program(layouts_of({lengths}, {from_strides}),
                          {item_of(Ints(lengths.size(), 0), Ints(lengths.size(), 0), lengths)}, {destination});
    const uint32_t source = 0x7fc00000;
    uint16_t result = 0;
    const box::Dim element{4, 1, 1};
    copy::convert_box(*program.transfers()[0].conversion, reinterpret_cast<std::byte*>(&result),
                      reinterpret_cast<const std::byte*>(&source), &element, 1);
    return result;
  };
  const auto& runnable = copy::runnable_vectors();
  const bool avx2 = std::find(runnable.begin(), runnable.end(), copy::Vectors::kAvx2) != runnable.end();
  const uint16_t vectors = avx2 ? 0xffff : 0x7fc0;
  CHECK(nan({4, 6}, {6, 1}, {6, 1}) == vectors);
  CHECK(nan({4, 6}, {9, 1}, {7, 1}) == vectors);
  CHECK(nan({4, 6}, {1, 4}, {1, 4}) == vectors);
  CHECK(nan({4, 1}, {1, 1}, {1, 1}) == vectors);
  CHECK(nan({1, 1}, {9, 5}, {7, 3}) == vectors);
  CHECK(nan({4, 6}, {6, 1}, {1, 4}) == 0x7fc0);
  CHECK(nan({4, 6}, {12, 2}, {6, 1}) == 0x7fc0);
  CHECK(nan({4, 6}, {6, 1}, {12, 2}) == 0x7fc0);
  CHECK(nan({4, 1}, {6, 1}, {1, 1}) == 0x7fc0);
  CHECK(nan({}, {}, {}) == 0x7fc0);
}

TEST_CASE("later items of one place wait, in torch's order of files") {
  std::string memory;
  const Layouts layouts = layouts_of({{4}, {4}});
  const auto destination = destination_of(memory, {4}, {1});
  const Item first = item_of({0}, {0}, {4}, 0);
  const Item second = item_of({0}, {0}, {4}, 1);
  const Program program(layouts, {second, first}, {destination});
  CHECK(program.waves() == 2);
  CHECK(program.transfers()[0].wave == 1);  // torch reads file by file
  CHECK(program.transfers()[1].wave == 0);
  CHECK(program.items_in_wave(0) == std::vector<size_t>{1});
  CHECK(program.items_in_wave(1) == std::vector<size_t>{0});
  CHECK_THROWS_AS(program.items_in_wave(2), std::out_of_range);
  CHECK_THROWS_AS(program.items_in_wave(-1), std::out_of_range);
  const Program apart(layouts, {item_of({0}, {0}, {2}, 0), item_of({0}, {2}, {2}, 1)}, {destination});
  CHECK(apart.waves() == 1);
}

TEST_CASE("boxes of a destination that overlaps itself wait for each other") {
  // Rows of torch.zeros(1, 4).expand(2, 4): the boxes differ, the memory is the same, and the last one wins.
  std::string memory;
  const Layouts layouts = layouts_of({{1, 4}, {1, 4}});
  const std::vector<Item> rows = {item_of({0, 0}, {0, 0}, {1, 4}, 0), item_of({0, 0}, {1, 0}, {1, 4}, 1)};
  for (const Ints& strides : {Ints{0, 1}, Ints{1, 1}}) {
    const Program program(layouts, rows, {destination_of(memory, {2, 4}, strides)});
    CAPTURE(strides[0]);
    CHECK(program.transfers()[0].wave < program.transfers()[1].wave);
  }
}

TEST_CASE("program: no payload is narrowed to the box that is asked for") {
  Layouts layouts = layouts_of({{4}});
  std::string memory;
  const std::vector<Destination> destinations = {destination_of(memory, {4}, {1})};
  // As of an archive: torch narrows only what is larger than the box.
  CHECK(Program(layouts, {item_of({2}, {0}, {4})}, destinations).transfers()[0].source == 5100);
  layouts.are_payloads = true;
  CHECK(Program(layouts, {item_of({0}, {0}, {4})}, destinations).transfers()[0].source == 5100);
  std::optional<Error> error;
  try {
    Program(layouts, {item_of({2}, {0}, {4})}, destinations);
  } catch (const Error& caught) {
    error = caught;
  }
  REQUIRE(error.has_value());
  CHECK(error->kind == ErrorKind::kSizeMismatch);
}

TEST_CASE("an empty box of a tensor with absurd strides is nothing to copy") {
  std::string memory;
  const Layouts layouts = layouts_of({{2, 0}}, {{int64_t{1} << 62, 1}});
  const Program program(layouts, {item_of({1, 0}, {1, 0}, {1, 0})}, {destination_of(memory, {2, 0}, {1, 1})});
  CHECK(program.transfers()[0].loops.empty());
}

TEST_CASE("a program of one wave is cut into others") {
  std::string memory;
  const Layouts layouts = layouts_of({{4}, {4}, {4}});
  const auto destination = [&](size_t at) {
    Destination result = destination_of(memory, {12}, {1});
    result.data += 16 * at;
    result.sizes = {4};
    return result;
  };
  std::vector<Destination> destinations = {destination(0), destination(1), destination(2)};
  const std::vector<Item> items = {item_of({0}, {0}, {4}, 0, 0), item_of({0}, {0}, {2}, 1, 1),
                                   item_of({1}, {1}, {3}, 2, 2)};
  Program program(layouts, items, destinations);
  REQUIRE(program.waves() == 1);
  CHECK(program.bytes_needed(0) == program.bytes_needed());
  program.cut({{2}, {}, {0, 1}});
  CHECK(program.waves() == 3);
  CHECK(program.items_in_wave(2) == std::vector<size_t>{0, 1});
  CHECK(program.transfers()[1].wave == 2);
  CHECK(program.bytes_needed(0) == 12);
  CHECK(program.bytes_needed(1) == 0);
  CHECK(program.bytes_needed(2) == 24);
  CHECK_THROWS_AS(program.bytes_needed(3), std::out_of_range);
  CHECK_THROWS_AS(program.cut({{0}, {1}, {2}}), std::invalid_argument);  // it has several waves already

  for (const std::vector<std::vector<size_t>>& waves :
       {std::vector<std::vector<size_t>>{{0, 1}}, {{0, 1}, {1, 2}}, {{0, 1, 2, 3}}, {}}) {
    Program whole(layouts, items, destinations);
    CHECK_THROWS_AS(whole.cut(waves), std::invalid_argument);
    CHECK(whole.items_in_wave(0).size() == 3);
  }

  destinations[2] = destinations[0];  // now boxes share memory
  Program shared(layouts, items, destinations);
  CHECK_THROWS_AS(shared.cut({{0, 1}, {2}}), std::invalid_argument);
}
