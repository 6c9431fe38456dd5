// What the two parts of the low-rank kernel share; `adapter_kernels/native_layouts.py` lays the same structures out.
#ifndef CHORALE_LOW_RANK_H
#define CHORALE_LOW_RANK_H

#include <stdint.h>

#define MAX_MEMBERS 3

// neighbouring rows begin .. begin + count of x and y, all of the adapter at one position of the slab
typedef struct {
  int64_t begin, count, position;
} Run;

// one site of a fused site: bt [capacity, rank, width], its columns of y and of the bridge
typedef struct {
  const uint16_t *bt;
  int64_t rank, width, out_begin, rank_begin;
} Member;

// a fused site of a slab: a [capacity, num_ranks, in_dim]
typedef struct {
  const uint16_t *a;
  int64_t num_ranks, in_dim, num_members;
  Member members[MAX_MEMBERS];
} Site;

// a matrix of bf16 whose rows are `stride` values apart
typedef struct {
  uint16_t *data;
  int64_t stride;
} Rows;

static inline Rows rows_from(Rows rows, int64_t row, int64_t column) {
  return (Rows){rows.data + row * rows.stride + column, rows.stride};
}

// bridge[i, r] = x[i, :] . a[r, :], rounded to bf16, for count rows and num_ranks rank rows
void shrink(Rows x, const uint16_t *a, int64_t in_dim, int64_t count, int64_t num_ranks, Rows bridge);

// y[i, c] += sum over r of bridge[i, r] * bt[r * width + c], summed in fp32 and rounded once, for c < num_columns
void expand(Rows bridge, const uint16_t *bt, int64_t rank, int64_t width, int64_t count, int64_t num_columns, Rows y);

#endif
