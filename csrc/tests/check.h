// Expectations for tests without a framework: failures are printed and counted, `result()` is main's value.
#pragma once

#include <cmath>
#include <cstdio>

namespace check {

inline int failures = 0;
inline const char* context = "";

inline void expect(bool condition, const char* what, const char* file, int line) {
  if (condition) return;
  if (failures < 50) std::printf("FAILED %s:%d [%s]: %s\n", file, line, context, what);
  ++failures;
}

inline void expect_near(double got, double expected, double allowed, const char* what, const char* file,
                        int line) {
  if (std::fabs(got - expected) <= allowed) return;
  if (failures < 50) {
    std::printf("FAILED %s:%d [%s]: %s is %.17g, expected %.17g within %.3g\n", file, line, context, what,
                got, expected, allowed);
  }
  ++failures;
}

inline int result(const char* name) {
  if (failures == 0) {
    std::printf("%s: all tests passed\n", name);
  } else {
    std::printf("%s: %d failures\n", name, failures);
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace check

#define EXPECT(condition) check::expect((condition), #condition, __FILE__, __LINE__)
#define EXPECT_NEAR(got, expected, allowed) \
  check::expect_near((got), (expected), (allowed), #got, __FILE__, __LINE__)
