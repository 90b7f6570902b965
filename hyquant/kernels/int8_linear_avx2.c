/* An int8 Linear for x86-64 processors that have AVX2 but no VNNI: quantize, multiply exactly, dequantize, in one pass.
 *
 * The usual AVX2 instruction for bytes, vpmaddubsw, saturates its 16-bit sums and is therefore wrong for full-range int8
 * operands. This kernel widens to 16 bits and uses vpmaddwd (two products and their sum per 32-bit lane): exact, and on
 * current cores up to twice the multiply-adds per cycle of a float32 FMA.
 *
 *   static    q = clamp(round(x m / s_x + z), -128, 127)          y = float(q W^T + quant_bias) * out_scale
 *   dynamic   s_r = max_k |x m| / 127,  q = round(x m / s_r)      y = float(q W^T) * s_r * out_scale + bias
 *
 * x float [M, K], W int8 [N, K], y float [M, N], all row-major; m [K], out_scale, quant_bias, bias [N].
 * W is packed in panels of 16 columns: int16 [ceil(N/16)][ceil(K/2)][16][2], zero padded. Rows are quantized 48 at a time
 * into a buffer of the thread, already widened. Tiles of 6 rows x 16 columns keep 12 accumulators in registers.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 6, COLUMNS = 16, CHUNK = 48 };

typedef struct {
    const float *mul;          /* [K] or NULL */
    const float *input_scale;  /* [1], or NULL: one scale per row */
    const float *input_offset; /* [1], or NULL */
    const float *out_scale;    /* [N] */
    const int32_t *quant_bias; /* [N], or NULL */
    const float *bias;         /* [N], or NULL */
    float smallest_scale;      /* of a row whose inputs are all zero */
} Params;

int64_t hyq_packed_size(int64_t n, int64_t k) { return (n + COLUMNS - 1) / COLUMNS * ((k + 1) / 2) * COLUMNS * 2; }

void hyq_pack_weight(const int8_t *weight, int16_t *packed, int64_t n, int64_t k) {
    const int64_t pairs = (k + 1) / 2;
    memset(packed, 0, sizeof(int16_t) * hyq_packed_size(n, k));
    for (int64_t column = 0; column < n; column++) {
        int16_t *panel = packed + column / COLUMNS * pairs * COLUMNS * 2 + column % COLUMNS * 2;
        for (int64_t i = 0; i < k; i++) panel[i / 2 * COLUMNS * 2 + i % 2] = weight[column * k + i];
    }
}

static float row_scale(const float *x, const float *mul, int64_t k, float smallest) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 maxima = _mm256_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        __m256 value = _mm256_loadu_ps(x + i);
        if (mul) value = _mm256_mul_ps(value, _mm256_loadu_ps(mul + i));
        maxima = _mm256_max_ps(maxima, _mm256_andnot_ps(sign, value));
    }
    float lanes[8], largest = 0.0f;
    _mm256_storeu_ps(lanes, maxima);
    for (int lane = 0; lane < 8; lane++) largest = lanes[lane] > largest ? lanes[lane] : largest;
    for (; i < k; i++) {
        const float value = fabsf(mul ? x[i] * mul[i] : x[i]);
        largest = value > largest ? value : largest;
    }
    const float scale = largest / 127.0f;
    return scale > smallest ? scale : smallest;
}

static void quantize_row(const float *x, const float *mul, int64_t k, float scale, float offset, int16_t *q) {
    const __m256 scales = _mm256_set1_ps(scale), offsets = _mm256_set1_ps(offset);
    const __m256 low = _mm256_set1_ps(-128.0f), high = _mm256_set1_ps(127.0f);
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
        __m256 value = _mm256_loadu_ps(x + i);
        if (mul) value = _mm256_mul_ps(value, _mm256_loadu_ps(mul + i));
        value = _mm256_add_ps(_mm256_div_ps(value, scales), offsets);
        value = _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256i codes = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(value, low), high));
        const __m128i wide = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
        _mm_storeu_si128((__m128i *)(q + i), wide);
    }
    for (; i < k; i++) {
        const float value = nearbyintf((mul ? x[i] * mul[i] : x[i]) / scale + offset);
        q[i] = (int16_t)(value < -128.0f ? -128.0f : value > 127.0f ? 127.0f : value);
    }
}

#define START(row) __m256i left##row = _mm256_setzero_si256(), right##row = _mm256_setzero_si256();
#define ACCUMULATE(row)                                                              \
    {                                                                                \
        int32_t pair;                                                                \
        memcpy(&pair, q + (row) * stride + 2 * p, sizeof pair);                      \
        const __m256i both = _mm256_set1_epi32(pair);                                \
        left##row = _mm256_add_epi32(left##row, _mm256_madd_epi16(both, w_left));    \
        right##row = _mm256_add_epi32(right##row, _mm256_madd_epi16(both, w_right)); \
    }
#define STORE(row)                                                       \
    _mm256_store_si256((__m256i *)(tile + (row) * COLUMNS), left##row);  \
    _mm256_store_si256((__m256i *)(tile + (row) * COLUMNS + 8), right##row);

static void multiply_tile(const int16_t *q, int64_t stride, const int16_t *panel, int64_t pairs, int32_t *tile) {
    START(0) START(1) START(2) START(3) START(4) START(5)
#pragma GCC unroll 2
    for (int64_t p = 0; p < pairs; p++) {
        const __m256i w_left = _mm256_loadu_si256((const __m256i *)(panel + p * COLUMNS * 2));
        const __m256i w_right = _mm256_loadu_si256((const __m256i *)(panel + p * COLUMNS * 2 + COLUMNS));
        ACCUMULATE(0) ACCUMULATE(1) ACCUMULATE(2) ACCUMULATE(3) ACCUMULATE(4) ACCUMULATE(5)
    }
    STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5)
}

/* Write COLUMNS outputs from the sums of one row of a tile; `out_scale`, `quant_bias` and `bias` start at its column. */
static void dequantize_row(const int32_t *sums, const float *row_scale, const float *out_scale,
                           const int32_t *quant_bias, const float *bias, float *y) {
    for (int64_t i = 0; i < COLUMNS; i += 8) {
        __m256i sum = _mm256_loadu_si256((const __m256i *)(sums + i));
        if (quant_bias) sum = _mm256_add_epi32(sum, _mm256_loadu_si256((const __m256i *)(quant_bias + i)));
        __m256 value = _mm256_cvtepi32_ps(sum);
        if (row_scale) value = _mm256_mul_ps(value, _mm256_set1_ps(*row_scale));
        value = _mm256_mul_ps(value, _mm256_loadu_ps(out_scale + i));
        if (bias) value = _mm256_add_ps(value, _mm256_loadu_ps(bias + i));
        _mm256_storeu_ps(y + i, value);
    }
}

/* The same for the last columns of a layer whose width is no multiple of COLUMNS. */
static void dequantize_rest(const int32_t *sums, const float *row_scale, const float *out_scale,
                            const int32_t *quant_bias, const float *bias, float *y, int64_t width) {
    for (int64_t i = 0; i < width; i++) {
        float value = (float)(quant_bias ? sums[i] + quant_bias[i] : sums[i]);
        if (row_scale) value = value * *row_scale;
        value = value * out_scale[i];
        y[i] = bias ? value + bias[i] : value;
    }
}

static void run_chunk(const float *x, const int16_t *packed, float *y, int64_t rows, int64_t n, int64_t k,
                      const Params *params, int16_t *q) {
    const int64_t pairs = (k + 1) / 2, stride = pairs * 2;
    float scales[CHUNK];
    for (int64_t row = 0; row < CHUNK; row++) {
        int16_t *codes = q + row * stride;
        codes[stride - 1] = 0;
        if (row >= rows) {
            memset(codes, 0, sizeof(int16_t) * stride);
            continue;
        }
        const float *values = x + row * k;
        scales[row] = params->input_scale ? *params->input_scale : row_scale(values, params->mul, k, params->smallest_scale);
        quantize_row(values, params->mul, k, scales[row], params->input_offset ? *params->input_offset : 0.0f, codes);
    }
    for (int64_t column = 0; column < n; column += COLUMNS) {
        const int64_t width = n - column < COLUMNS ? n - column : COLUMNS;
        const float *out_scale = params->out_scale + column, *bias = params->bias ? params->bias + column : NULL;
        const int32_t *quant_bias = params->quant_bias ? params->quant_bias + column : NULL;
        for (int64_t row = 0; row < rows; row += ROWS) {
            int32_t tile[ROWS * COLUMNS] __attribute__((aligned(32)));
            multiply_tile(q + row * stride, stride, packed + column * pairs * 2, pairs, tile);
            for (int64_t r = 0; r < ROWS && row + r < rows; r++) {
                const float *scale = params->input_scale ? NULL : scales + row + r;
                const int32_t *sums = tile + r * COLUMNS;
                float *out = y + (row + r) * n + column;
                if (width == COLUMNS) dequantize_row(sums, scale, out_scale, quant_bias, bias, out);
                else dequantize_rest(sums, scale, out_scale, quant_bias, bias, out, width);
            }
        }
    }
}

/* Return 0, or 1 when a thread could not get its buffer (y is then incomplete). */
int hyq_int8_linear(const float *x, const int16_t *packed, float *y, int64_t m, int64_t n, int64_t k, const float *mul,
                    const float *input_scale, const float *input_offset, const float *out_scale,
                    const int32_t *quant_bias, const float *bias, float smallest_scale, int threads) {
    const Params params = {mul, input_scale, input_offset, out_scale, quant_bias, bias, smallest_scale};
    const int64_t chunks = (m + CHUNK - 1) / CHUNK;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed) if (chunks > 1)
    {
        int16_t *q = aligned_alloc(64, (sizeof(int16_t) * CHUNK * (k + 2) + 63) / 64 * 64);
        failed = q == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t row = chunk * CHUNK, rows = m - row < CHUNK ? m - row : CHUNK;
            if (q) run_chunk(x + row * k, packed, y + row * n, rows, n, k, &params, q);
        }
        free(q);
    }
    return failed;
}
