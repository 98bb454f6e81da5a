// The CPU driver.
#pragma once
#include <string>
#include <vector>
#include "table.h"

// Updates every row of the buckets, each bucket in one parallel region of at most `threads` threads, and raises the rows' step
// counts. What can fail, memory and a name that is none of cpu_isas(), fails before anything has changed.
void run_cpu(const std::vector<Bucket>& buckets, int threads, const std::string& isa);

// The sum of the squares of the bucket's gradients, in double: the same bits for any number of threads and instruction set.
double sum_of_squares_cpu(const Bucket& bucket, int threads, const std::string& isa);

// The instruction sets this build has and this processor runs, best first.
std::vector<std::string> cpu_isas();
