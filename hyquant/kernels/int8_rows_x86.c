/* Rows of weights for x86-64 processors: their largest magnitude, their int8 codes, the codes' sums and errors.
 *
 *   absmax_n = max_k |w_nk m_k|        q_nk = clamp(round(w_nk m_k / s_n), lowest, largest)
 *   signal = sum w^2                   noise = sum (w - q s_n)^2
 *
 * w [N, K] float32 or bfloat16, row-major; m [K] float32, or NULL for ones. All float arithmetic is float32 in the order
 * written here, so codes equal those of the operators one after the other; sums of squares are float32 over a lane's part
 * of a row and double beyond. A NaN or infinity in a row is one in its absmax.
 */
#include "int8_x86.h"

enum { PIECE = 1024 };

/* Return a pointer to `count` values of a row from `at` on, multiplied, as float32. */
static inline const float *piece_of(const void *w, int is_bfloat, const float *mul, int64_t row, int64_t at, int64_t k,
                                    int64_t count, float *buffer) {
    const float *x = (const float *)w + row * k + at;
    const uint16_t *half = (const uint16_t *)w + row * k + at;
    if (!is_bfloat && !mul) return x;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        floats value = is_bfloat ? load_bfloat(half + i) : load_float(x + i);
        if (mul) value = mul_float(value, load_float(mul + at + i));
        store_float(buffer + i, value);
    }
    for (; i < count; i++) buffer[i] = (is_bfloat ? bfloat_at(half + i) : x[i]) * (mul ? mul[at + i] : 1.0f);
    return buffer;
}

/* Magnitudes are compared as integers, in which a NaN is larger than infinity. */
void hyq_row_absmax(const void *w, int is_bfloat, const float *mul, float *absmax, int64_t n, int64_t k, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++) {
        float buffer[PIECE];
        integers largest = set_int(0);
        int32_t lanes[LANES], top = 0;
        for (int64_t at = 0; at < k; at += PIECE) {
            const int64_t count = k - at < PIECE ? k - at : PIECE;
            const float *x = piece_of(w, is_bfloat, mul, row, at, k, count, buffer);
            int64_t i = 0;
            for (; i + LANES <= count; i += LANES) largest = max_int(largest, and_int(load_int(x + i), set_int(0x7fffffff)));
            for (; i < count; i++) {
                int32_t bits;
                memcpy(&bits, x + i, sizeof bits);
                bits &= 0x7fffffff;
                top = bits > top ? bits : top;
            }
        }
        store_int(lanes, largest);
        for (int lane = 0; lane < LANES; lane++) top = lanes[lane] > top ? lanes[lane] : top;
        memcpy(absmax + row, &top, sizeof top);
    }
}

void hyq_quantize_rows(const void *w, int is_bfloat, const float *mul, const float *scales, int8_t *codes, float lowest,
                       float largest, int64_t n, int64_t k, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++) {
        float buffer[PIECE];
        const floats scale = set_float(scales[row]), low = set_float(lowest), high = set_float(largest);
        for (int64_t at = 0; at < k; at += PIECE) {
            const int64_t count = k - at < PIECE ? k - at : PIECE;
            const float *x = piece_of(w, is_bfloat, mul, row, at, k, count, buffer);
            int8_t *out = codes + row * k + at;
            int64_t i = 0;
            for (; i + LANES <= count; i += LANES)
                store_bytes(out + i, min_float(max_float(round_float(div_float(load_float(x + i), scale)), low), high));
            for (; i < count; i++) {
                const float value = nearbyintf(x[i] / scales[row]);
                out[i] = (int8_t)(value > lowest ? (value < largest ? value : largest) : lowest);
            }
        }
    }
}

void hyq_row_sums(const int8_t *codes, int32_t *sums, int64_t n, int64_t k, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n; row++) {
        int32_t sum = 0;
        for (int64_t i = 0; i < k; i++) sum += codes[row * k + i];
        sums[row] = sum;
    }
}

/* Write signal and noise. */
void hyq_row_errors(const void *w, int is_bfloat, const int8_t *codes, const float *scales, double *sums, int64_t n,
                    int64_t k, int threads) {
    double signal = 0, noise = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : signal, noise)
    for (int64_t row = 0; row < n; row++) {
        float buffer[PIECE], lanes[2][LANES];
        const floats scale = set_float(scales[row]);
        for (int64_t at = 0; at < k; at += PIECE) {
            const int64_t count = k - at < PIECE ? k - at : PIECE;
            const float *x = piece_of(w, is_bfloat, NULL, row, at, k, count, buffer);
            const int8_t *q = codes + row * k + at;
            floats squares = set_float(0.0f), errors = set_float(0.0f);
            int64_t i = 0;
            for (; i + LANES <= count; i += LANES) {
                const floats value = load_float(x + i), error = sub_float(value, mul_float(load_bytes(q + i), scale));
                squares = add_float(squares, mul_float(value, value));
                errors = add_float(errors, mul_float(error, error));
            }
            store_float(lanes[0], squares);
            store_float(lanes[1], errors);
            for (int lane = 0; lane < LANES; lane++) {
                signal += lanes[0][lane];
                noise += lanes[1][lane];
            }
            for (; i < count; i++) {
                const float error = x[i] - q[i] * scales[row];
                signal += (double)x[i] * x[i];
                noise += (double)error * error;
            }
        }
    }
    sums[0] = signal;
    sums[1] = noise;
}
