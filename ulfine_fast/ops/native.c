/* The passes of a training step around its matrix products: each reads and writes its values once.
 *
 * On a processor they replace chains of operations of plain PyTorch, which are their specification. Built by
 * ulfine_fast.ops.native for the machine at hand. Tensors are float32, the last axis contiguous; other strides are
 * arguments that count values. A trial's result does not depend on how many trials there are.
 *
 * T trials, n rows, D dimensions, H heads, K classes, M = H K class vectors, r the adapter's rank.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define EPSILON 1e-12f
#define SHORTEST 1e-6f
#define TINY 1.17549435e-38f

/* rows that are on their way from memory */
#ifndef AHEAD
#define AHEAD 3
#endif

typedef int64_t integer;

/* e^x for x <= 0, to 2e-7 of it; below -87 it is e^-87. Unlike the library's it becomes vector instructions. */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* the nearest integer in the low bits */
    float n = shifted - 12582912.0f;
    float rest = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, x));
    float sum = fmaf(rest, 1.0f / 720.0f, 1.0f / 120.0f);
    sum = fmaf(rest, sum, 1.0f / 24.0f);
    sum = fmaf(rest, sum, 1.0f / 6.0f);
    sum = fmaf(rest, sum, 0.5f);
    sum = fmaf(rest, sum, 1.0f);
    sum = fmaf(rest, sum, 1.0f);
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    int32_t power = (bits + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return sum * scale;
}

static float largest_of(const float *x, integer count)
{
    float largest = x[0];
#pragma omp simd reduction(max : largest)
    for (integer i = 0; i < count; i++)
        largest = x[i] > largest ? x[i] : largest;
    return largest;
}

static float dot(const float *x, const float *y, integer count)
{
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (integer i = 0; i < count; i++)
        total += x[i] * y[i];
    return total;
}

/* Rows (n, D) of a store by their numbers, to two places, and their means. Both places may be the same. */
void gather(const float *store, const integer *slots, float *out, float *copy, float *means, integer trials,
            integer rows, integer dim, integer at_trial, integer mean_trial)
{
    integer last = trials * rows - 1;
    for (integer i = 0; i <= last; i++) {
        /* the rows are far apart in memory: those to come are asked for before they are read */
        const char *next = (const char *)(store + slots[i + AHEAD < last ? i + AHEAD : last] * dim);
        for (integer line = 0; line < dim * 4; line += 64)
            __builtin_prefetch(next + line);
        integer t = i / rows, b = i % rows;
        const float *row = store + slots[i] * dim;
        float *target = out + t * at_trial + b * dim, *other = copy + t * at_trial + b * dim, total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (integer d = 0; d < dim; d++) {
            target[d] = row[d];
            other[d] = row[d];
            total += row[d];
        }
        means[t * mean_trial + b] = total / dim;
    }
}

/* 1 / length of rows (T, n, D). */
void inverse_lengths(const float *x, float *out, integer trials, integer rows, integer dim, integer at_trial,
                     integer out_trial)
{
    for (integer t = 0; t < trials; t++)
        for (integer b = 0; b < rows; b++) {
            const float *row = x + t * at_trial + b * dim;
            float length = sqrtf(dot(row, row, dim));
            out[t * out_trial + b] = 1.0f / (length < SHORTEST ? SHORTEST : length);
        }
}

/* A contiguous copy of rows (T, n, D), and 1 / length of each. */
void copy_and_measure(const float *x, float *copy, float *out, integer trials, integer rows, integer dim,
                      integer at_trial)
{
    for (integer t = 0; t < trials; t++)
        for (integer b = 0; b < rows; b++) {
            const float *row = x + t * at_trial + b * dim;
            float *target = copy + (t * rows + b) * dim, square = 0.0f;
#pragma omp simd reduction(+ : square)
            for (integer d = 0; d < dim; d++) {
                target[d] = row[d];
                square += row[d] * row[d];
            }
            float length = sqrtf(square);
            out[t * rows + b] = 1.0f / (length < SHORTEST ? SHORTEST : length);
        }
}

/* The adapter's down matrix (D, r) with the norm's scale in it, its sum over D, and the shift's product with it. */
void adapter_prepare(const float *down, const float *scale, const float *shift, float *first, float *sums,
                     float *offset, integer trials, integer dim, integer rank, integer at_trial)
{
    memset(sums, 0, trials * rank * sizeof(float));
    memset(offset, 0, trials * rank * sizeof(float));
    for (integer t = 0; t < trials; t++) {
        float *sum = sums + t * rank, *off = offset + t * rank;
        for (integer d = 0; d < dim; d++) {
            const float *row = down + t * at_trial + d * rank;
            float *target = first + (t * dim + d) * rank;
            float factor = scale[t * at_trial + d], other = shift[t * at_trial + d];
#pragma omp simd
            for (integer j = 0; j < rank; j++) {
                float value = row[j] * factor;
                target[j] = value;
                sum[j] += value;
                off[j] += row[j] * other;
            }
        }
    }
}

/* s relu(i u + offset - m i sums) in place of the products u (T, n, r); i, the rows' inverse deviation, and m i. */
void adapter_hidden(float *hidden, const float *means, float *inverse, float *shifted, const float *sums,
                    const float *offset, const float *strength, float mean_square, integer trials, integer rows, integer rank,
                    integer at_trial, integer row_trial)
{
    for (integer t = 0; t < trials; t++)
        for (integer b = 0; b < rows; b++) {
            float *u = hidden + t * at_trial + b * rank;
            float mean = means[t * row_trial + b], factor = 1.0f / sqrtf(mean_square - mean * mean);
            float drift = mean * factor, times = strength[t];
            inverse[t * row_trial + b] = factor;
            shifted[t * row_trial + b] = drift;
            const float *sum = sums + t * rank, *off = offset + t * rank;
#pragma omp simd
            for (integer j = 0; j < rank; j++) {
                float value = u[j] * factor + off[j] - drift * sum[j];
                u[j] = value < 0.0f ? 0.0f : value * times;
            }
        }
}

/* s relu's gradient in place of dh (T, n, r), times i; before that, its sums over rows, and those times m i. */
void adapter_hidden_gradient(float *inner, const float *hidden, const float *inverse, const float *shifted,
                             const float *strength, float *sums, float *drift, integer trials, integer rows, integer rank,
                             integer hidden_trial, integer row_trial)
{
    memset(sums, 0, trials * rank * sizeof(float));
    memset(drift, 0, trials * rank * sizeof(float));
    for (integer t = 0; t < trials; t++) {
        float *sum = sums + t * rank, *drifting = drift + t * rank;
        for (integer b = 0; b < rows; b++) {
            float *g = inner + (t * rows + b) * rank;
            const float *h = hidden + t * hidden_trial + b * rank;
            float factor = inverse[t * row_trial + b], off = shifted[t * row_trial + b], times = strength[t];
#pragma omp simd
            for (integer j = 0; j < rank; j++) {
                float value = h[j] != 0.0f ? g[j] * times : 0.0f;
                sum[j] += value;
                drifting[j] += off * value;
                g[j] = value * factor;
            }
        }
    }
}

/* Velocities of down, scale and shift: their momentum, and gradients from Q + drift (T, D, r). */
void adapter_gradients(const float *quotient, const float *drift, const float *sums, const float *down,
                       const float *scale, const float *shift, float *down_velocity, float *scale_velocity,
                       float *shift_velocity, float momentum, integer trials, integer dim, integer rank,
                       integer at_trial)
{
    for (integer t = 0; t < trials; t++) {
        const float *sum = sums + t * rank, *drifting = drift + t * rank;
        for (integer d = 0; d < dim; d++) {
            const float *q = quotient + (t * dim + d) * rank, *w = down + t * at_trial + d * rank;
            float *v = down_velocity + t * at_trial + d * rank;
            float factor = scale[t * at_trial + d], other = shift[t * at_trial + d];
            float by_scale = 0.0f, by_shift = 0.0f;
#pragma omp simd reduction(+ : by_scale, by_shift)
            for (integer j = 0; j < rank; j++) {
                float value = q[j] - drifting[j];
                v[j] = momentum * v[j] + value * factor + other * sum[j];
                by_scale += value * w[j];
                by_shift += w[j] * sum[j];
            }
            float *v_scale = scale_velocity + t * at_trial + d, *v_shift = shift_velocity + t * at_trial + d;
            *v_scale = momentum * *v_scale + by_scale;
            *v_shift = momentum * *v_shift + by_shift;
        }
    }
}

/* Logits (T, n, M) times a factor of their row and one of their vector. */
void scale_logits(float *logits, const float *row_scale, const float *column_scale, integer trials, integer rows,
                  integer columns, integer at_trial, integer row_trial)
{
    for (integer t = 0; t < trials; t++)
        for (integer b = 0; b < rows; b++) {
            float *z = logits + t * at_trial + b * columns, factor = row_scale[t * row_trial + b];
            const float *scale = column_scale + t * columns;
#pragma omp simd
            for (integer k = 0; k < columns; k++)
                z[k] *= factor * scale[k];
        }
}

/* w (softmax(z + adjustment) - onehot(y)) of rows (T, n, H, K), and log softmax(z + adjustment)_y. */
void cross_entropy(const float *logits, const float *adjustment, const integer *labels, const float *weights,
                   float *gradient, float *log_probabilities, integer trials, integer rows, integer heads,
                   integer classes, integer logits_trial, integer adjustment_trial, integer adjustment_head,
                   integer gradient_trial, integer row_trial, integer log_trial)
{
    for (integer t = 0; t < trials; t++)
        for (integer b = 0; b < rows; b++)
            for (integer h = 0; h < heads; h++) {
                const float *z = logits + t * logits_trial + (b * heads + h) * classes;
                const float *shift = adjustment + t * adjustment_trial + h * adjustment_head;
                float *g = gradient + t * gradient_trial + (b * heads + h) * classes;
#pragma omp simd
                for (integer k = 0; k < classes; k++)
                    g[k] = z[k] + shift[k];
                float largest = largest_of(g, classes), total = 0.0f;
#pragma omp simd reduction(+ : total)
                for (integer k = 0; k < classes; k++) {
                    g[k] = exponential(g[k] - largest);
                    total += g[k];
                }
                integer label = labels[t * row_trial + b];
                float weight = weights[t * row_trial + b], factor = weight / total, picked = g[label] / total;
#pragma omp simd
                for (integer k = 0; k < classes; k++)
                    g[k] *= factor;
                g[label] -= weight;
                /* a probability that underflows has a finite loss, one that is no number keeps it */
                log_probabilities[t * log_trial + b * heads + h] = logf(picked < TINY ? TINY : picked);
            }
}

/* With g = dL/dz: g times the factors of its row and vector in place, and the sums of g z over rows and vectors. */
void logit_gradient(float *gradient, const float *logits, const float *row_scale, const float *column_scale,
                    float *along_columns, float *along_rows, integer trials, integer rows, integer columns,
                    integer logits_trial, integer row_trial)
{
    memset(along_columns, 0, trials * columns * sizeof(float));
    for (integer t = 0; t < trials; t++)
        for (integer b = 0; b < rows; b++) {
            float *g = gradient + (t * rows + b) * columns, *along = along_columns + t * columns;
            const float *z = logits + t * logits_trial + b * columns, *scale = column_scale + t * columns;
            float factor = row_scale[t * row_trial + b], total = 0.0f;
#pragma omp simd reduction(+ : total)
            for (integer k = 0; k < columns; k++) {
                float product = g[k] * z[k];
                along[k] += product;
                total += product;
                g[k] *= factor * scale[k];
            }
            along_rows[t * rows + b] = total;
        }
}

/* The gradient (T, n, D) of rows, without what only changes their length: minus along / length^2 times the row. */
void subtract_rows(float *gradient, const float *rows, const float *along, const float *inverse, integer trials,
                   integer count, integer dim, integer rows_trial, integer inverse_trial)
{
    for (integer t = 0; t < trials; t++)
        for (integer b = 0; b < count; b++) {
            float *g = gradient + (t * count + b) * dim;
            const float *row = rows + t * rows_trial + b * dim;
            float factor = inverse[t * inverse_trial + b];
            factor *= factor * along[t * count + b];
#pragma omp simd
            for (integer d = 0; d < dim; d++)
                g[d] -= factor * row[d];
        }
}

/* v <- v + c p, then p <- p - rate v: class vectors (T, M, D) with a factor c of each, the others with their trial's. */
void update(float *parameters, float *velocity, const float *factors, const float *decay, const float *rates,
            integer trials, integer vectors, integer dim, integer size, integer at_trial)
{
    for (integer t = 0; t < trials; t++) {
        float rate = rates[t];
        for (integer k = 0; k < vectors; k++) {
            float *p = parameters + t * at_trial + k * dim, *v = velocity + t * at_trial + k * dim;
            float factor = factors[t * vectors + k];
#pragma omp simd
            for (integer d = 0; d < dim; d++) {
                v[d] += factor * p[d];
                p[d] -= rate * v[d];
            }
        }
        float *p = parameters + t * at_trial, *v = velocity + t * at_trial, factor = decay[t];
#pragma omp simd
        for (integer i = vectors * dim; i < size; i++) {
            v[i] += factor * p[i];
            p[i] -= rate * v[i];
        }
    }
}

/* The factor of the orthogonality's gradient in place of the Gram matrix (T, K, K), and || U U^T - I ||_F^2. */
void orthogonality(float *gram, const float *inverse, const float *factors, float *squares, integer trials,
                   integer classes, integer inverse_trial)
{
    for (integer t = 0; t < trials; t++) {
        const float *lengths = inverse + t * inverse_trial;
        float factor = factors[t], penalty = 0.0f;
        for (integer k = 0; k < classes; k++) {
            float *row = gram + (t * classes + k) * classes, own = lengths[k], along = 0.0f, square = 0.0f;
            float self = own * own * row[k];
#pragma omp simd reduction(+ : along, square)
            for (integer j = 0; j < classes; j++) {
                float scale = own * lengths[j], cosine = scale * row[j];
                square += cosine * cosine;
                along += cosine * cosine;
                row[j] = factor * cosine * scale;
            }
            /* the diagonal's cosine is 1 in the identity's favour; the part along the vector only changes its length */
            along = factor * (along - self);
            row[k] = factor * (self - 1.0f) * own * own - along * own * own;
            penalty += square - self * self + (self - 1.0f) * (self - 1.0f);
        }
        squares[t] = penalty;
    }
}

/* Fused logits, then pseudo-labels, their mask, and the mean probability of each class; room holds K values. */
void pseudo_labels(const float *linear, const float *similarity, const float *eta, const float *threshold,
                   const float *temperature, integer *labels, float *mask, float *mean, float *room, integer trials,
                   integer rows, integer classes, integer at_trial, integer at_row)
{
    memset(mean, 0, trials * classes * sizeof(float));
    for (integer t = 0; t < trials; t++) {
        float *average = mean + t * classes, weight = eta[t], divide = 1.0f / temperature[t];
        for (integer b = 0; b < rows; b++) {
            const float *x = linear + t * at_trial + b * at_row, *s = similarity + t * at_trial + b * at_row;
            float x_level = 0.0f, s_level = 0.0f, x_square = 0.0f, s_square = 0.0f, total = 0.0f;
#pragma omp simd reduction(+ : x_level, s_level)
            for (integer k = 0; k < classes; k++) {
                x_level += x[k];
                s_level += s[k];
            }
            x_level /= classes;
            s_level /= classes;
#pragma omp simd reduction(+ : x_square, s_square)
            for (integer k = 0; k < classes; k++) {
                x_square += (x[k] - x_level) * (x[k] - x_level);
                s_square += (s[k] - s_level) * (s[k] - s_level);
            }
            float ratio = (sqrtf(s_square) + 1e-6f) / (sqrtf(x_square) + 1e-6f);
#pragma omp simd
            for (integer k = 0; k < classes; k++)
                room[k] = (s[k] + weight * (s_level + (x[k] - x_level) * ratio - s[k])) * divide;
            float largest = largest_of(room, classes);
            integer label = 0;
            for (integer k = classes - 1; k >= 0; k--)
                label = room[k] == largest ? k : label;
#pragma omp simd reduction(+ : total)
            for (integer k = 0; k < classes; k++) {
                room[k] = exponential(room[k] - largest);
                total += room[k];
            }
            float factor = 1.0f / total;
#pragma omp simd
            for (integer k = 0; k < classes; k++)
                average[k] += room[k] * factor;
            labels[t * rows + b] = label;
            mask[t * rows + b] = room[label] * factor >= threshold[t] ? 1.0f : 0.0f;
        }
        for (integer k = 0; k < classes; k++)
            average[k] /= rows;
    }
}

/* Class means of a batch, moving averages and fitting of prototypes (T, K, D); room holds K values. */
void move_prototypes(float *visual, uint8_t *seen, float *textual, const float *rows, const float *inverse,
                     const integer *labels, const float *momentum, const float *alpha, float *room, integer trials,
                     integer batch, integer classes, integer dim, integer text_trial, integer rows_trial,
                     integer row_trial, integer label_trial)
{
    for (integer t = 0; t < trials; t++) {
        const integer *of_rows = labels + t * label_trial;
        memset(room, 0, classes * sizeof(float));
        for (integer b = 0; b < batch; b++)
            room[of_rows[b]] += 1.0f;
        /* a class that is met for the first time keeps nothing of its old vector */
        for (integer k = 0; k < classes; k++)
            if (room[k] > 0.0f) {
                float *v = visual + (t * classes + k) * dim;
                float kept = seen[t * classes + k] ? momentum[t] : 0.0f;
#pragma omp simd
                for (integer d = 0; d < dim; d++)
                    v[d] *= kept;
            }
        for (integer b = 0; b < batch; b++) {
            integer k = of_rows[b];
            float *v = visual + (t * classes + k) * dim, kept = seen[t * classes + k] ? momentum[t] : 0.0f;
            const float *row = rows + t * rows_trial + b * dim;
            float weight = (1.0f - kept) / room[k] * inverse[t * row_trial + b];
#pragma omp simd
            for (integer d = 0; d < dim; d++)
                v[d] += weight * row[d];
        }
        for (integer k = 0; k < classes; k++) {
            float *v = visual + (t * classes + k) * dim, *c = textual + t * text_trial + k * dim;
            if (room[k] > 0.0f) {
                float factor = 1.0f / sqrtf(dot(v, v, dim) + EPSILON);
#pragma omp simd
                for (integer d = 0; d < dim; d++)
                    v[d] *= factor;
                seen[t * classes + k] = 1;
            }
            if (!seen[t * classes + k])
                continue;
            float pace = alpha[t * classes + k], kept = (1.0f - pace) / sqrtf(dot(c, c, dim) + EPSILON), square = 0.0f;
#pragma omp simd reduction(+ : square)
            for (integer d = 0; d < dim; d++) {
                c[d] = kept * c[d] + pace * v[d];
                square += c[d] * c[d];
            }
            float factor = 1.0f / sqrtf(square + EPSILON);
#pragma omp simd
            for (integer d = 0; d < dim; d++)
                c[d] *= factor;
        }
    }
}
