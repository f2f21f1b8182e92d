// The text of the kernel that ships, run by the interpreter.
#include <string>
#include <vector>

#include "box_copy_launch.h"
#include "doctest/doctest.h"
#include "ptx/interpreter.h"
#include "random.h"

using namespace simcuda::testing;
using dcp_fast::testing::Random;
using simcuda::ptx::Coverage;
using simcuda::ptx::Kernel;
using simcuda::ptx::Module;

TEST_CASE("box copy kernel: the slot's address, entries and their count are its parameters") {
  const Module module(box_copy_ptx());
  const Kernel& kernel = module.kernel(kBoxCopyName);
  REQUIRE(kernel.parameters().size() == 3);
  CHECK(kernel.parameters()[0].size == 8);
  CHECK(kernel.parameters()[1].offset == 8);
  CHECK(kernel.parameters()[2].offset == 12);
  CHECK(kernel.parameter_bytes() == 16);
}

TEST_CASE("box copy kernel: launches of all kinds, which together reach every instruction") {
  const Module module(box_copy_ptx());
  const Kernel& kernel = module.kernel(kBoxCopyName);
  Random random(1);
  std::vector<Launch> launches = plain_launches(random);
  for (const Launch& launch : sparse_launches(random)) launches.push_back(launch);
  for (int i = 0; i < 400; ++i) launches.push_back(random_launch(random));
  for (size_t i = 0; i < launches.size(); ++i) {
    CAPTURE(i);
    REQUIRE(failure_of(kernel, launches[i], simcuda::ptx::kStepsPerThread) == "");
  }
  const Coverage coverage = kernel.coverage();
  CAPTURE(coverage.lines_never_executed);
  CHECK(coverage.executed * 100 >= coverage.total * 95);
}

TEST_CASE("box copy kernel: more than 65536 entries") {
  const Module module(box_copy_ptx());
  Random random(2);
  const Box box{0, uint64_t{1} << 40, 100, 4, {}};
  std::vector<Entry> entries(70'000);
  entries.back().count = 100;
  Launch launch = make_launch(random, uint64_t{1} << 36, 400, {box}, entries);
  launch.grid.x = 1000;
  launch.block.x = 2;
  CHECK(failure_of(module.kernel(kBoxCopyName), launch, simcuda::ptx::kStepsPerThread) == "");
}

TEST_CASE("box copy kernel: what no slot may ask for is noticed") {
  const Module module(box_copy_ptx());
  const Kernel& kernel = module.kernel(kBoxCopyName);
  Random random(3);
  const auto failure = [&](const Box& box) {
    return failure_of(kernel, make_launch(random, uint64_t{1} << 36, 4096, {box}, {{0, 0, 100}}), 100'000);
  };
  const uint64_t destination = uint64_t{1} << 40;
  REQUIRE(failure({0, destination, 100, 4, {}}).empty());
  CHECK(failure({0, destination, 99, 4, {}}).find("write out of bounds") != std::string::npos);
  CHECK(failure({0, destination + 8, 100, 16, {}}).find("misaligned access of 16 bytes") != std::string::npos);
  CHECK(failure({8, destination, 100, 16, {}}).find("misaligned access of 16 bytes") != std::string::npos);
  CHECK(failure({0, destination, 100, 4, {{50, 0, 4}, {2, 0, 4}}}).find("a second write") != std::string::npos);
}
