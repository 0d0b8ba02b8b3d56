// How the threads of an op share its work: by blocks of rows, or by columns of a product.
#pragma once

#include <algorithm>

#include "cpu/gemm/engine.h"
#include "cpu/runtime/arguments.h"
#include "cpu/threads.h"

namespace adacomcat {

// The products of one thread in an op.
class Session {
 public:
  explicit Session(const Engine& engine) : engine_(engine) { engine_.begin(); }
  ~Session() { engine_.end(); }
  Session(const Session&) = delete;

 private:
  const Engine& engine_;
};

// Whether a piece of work is the first one of its thread, and the last one of the thread's share.
struct Turn {
  bool first, last;
};

// body(item, turn) for items 0 … count - 1, with the engine's products begun on each thread.
template <typename Body>
inline void for_each_item(const Engine& engine, int64_t count, const Body& body) {
  share_out(count, [&](Items& items) {
    const Session session(engine);
    bool first = true;
    for (int64_t item; items.take(item); first = false) {
      body(item, Turn{first, items.own_is_done()});
    }
  });
}

// Rows of a block: whole steps, at most engine.block_rows, and so that threads get equally many blocks.
inline int64_t block_rows(const Engine& engine, int64_t rows) {
  const int64_t steps = ceil_div(rows, engine.row_step), threads = thread_count();
  const int64_t per_block = engine.block_rows / engine.row_step;
  const int64_t rounds = std::max<int64_t>(ceil_div(steps, threads * per_block), 1);
  return std::max<int64_t>(ceil_div(steps, threads * rounds), 1) * engine.row_step;
}

// body(first row, rows, turn) for each block of rows.
template <typename Body>
inline void for_each_block(const Engine& engine, int64_t rows, Body body) {
  const int64_t block = block_rows(engine, rows);
  for_each_item(engine, ceil_div(rows, block), [&](int64_t i, Turn turn) {
    body(i * block, std::min(block, rows - i * block), turn);
  });
}

// A part of a product: some rows, and some columns in whole panels.
struct Part {
  int64_t row, rows, panel, panels;
  Turn turn;
};

// Panels that `columns` columns take.
inline int64_t panel_count(const Engine& engine, int64_t columns) {
  return ceil_div(columns, engine.panel_columns());
}

// Whether threads share out columns instead of rows. Each then reads all rows but a part of the weights
// only, which with few rows are most of what there is to read.
inline bool shares_columns(const Engine& engine, int64_t rows, int64_t panels) {
  const int64_t threads = thread_count();
  return threads > 1 && rows <= 2 * engine.block_rows && panels >= 2 * threads;
}

// body(part) for each part of a product (rows, panels).
template <typename Body>
inline void for_each_part(const Engine& engine, int64_t rows, int64_t panels, Body body) {
  if (!shares_columns(engine, rows, panels)) {
    for_each_block(engine, rows,
                   [&](int64_t row, int64_t m, Turn turn) { body(Part{row, m, 0, panels, turn}); });
    return;
  }
  const int64_t share = ceil_div(panels, thread_count());
  for_each_item(engine, ceil_div(panels, share), [&](int64_t i, Turn turn) {
    body(Part{0, rows, i * share, std::min(share, panels - i * share), turn});
  });
}

}  // namespace adacomcat
