#include "child.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <stdexcept>

namespace dcp_fast::testing {

namespace {

// Without the end of the process that atexit handlers see: they belong to the parent.
[[noreturn]] void run(const std::function<std::string()>& body, int pipe) {
  std::string text;
  try {
    text = body();
  } catch (const std::exception& error) {
    text = std::string("threw ") + error.what();
  }
  size_t written = 0;
  while (written < text.size()) {
    const ssize_t count = ::write(pipe, text.data() + written, text.size() - written);
    if (count <= 0) ::_exit(EXIT_FAILURE);
    written += static_cast<size_t>(count);
  }
  ::_exit(EXIT_SUCCESS);
}

std::string read_all(int pipe) {
  std::string text;
  std::array<char, 4096> buffer{};
  for (ssize_t count = 1; count > 0;) {
    count = ::read(pipe, buffer.data(), buffer.size());
    if (count > 0) text.append(buffer.data(), static_cast<size_t>(count));
  }
  return text;
}

}  // namespace

std::string in_child(const std::function<std::string()>& body, unsigned seconds) {
  std::array<int, 2> pipe{};
  if (::pipe(pipe.data()) != 0) throw std::runtime_error("cannot make a pipe");
  const pid_t child = ::fork();
  if (child < 0) throw std::runtime_error("cannot fork");
  if (child == 0) {
    ::close(pipe[0]);
    ::alarm(seconds);
    run(body, pipe[1]);
  }
  ::close(pipe[1]);
  std::string text = read_all(pipe[0]);
  ::close(pipe[0]);
  int status = 0;
  if (::waitpid(child, &status, 0) != child) throw std::runtime_error("cannot wait for a child");
  if (WIFSIGNALED(status)) {
    const int number = WTERMSIG(status);
    return number == SIGALRM ? "hung" : "ended by signal " + std::to_string(number);
  }
  return WEXITSTATUS(status) == EXIT_SUCCESS ? text : "exited with " + std::to_string(WEXITSTATUS(status));
}

}  // namespace dcp_fast::testing
