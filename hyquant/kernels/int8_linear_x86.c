/* An int8 Linear for x86-64 processors: quantize, multiply exactly, dequantize.
 *
 *   static    q = clamp(round(x m / s_x + z), -128, 127)          y = float(q W^T + quant_bias) * out_scale
 *   dynamic   s_r = max_k |x m| / c,    q = round(x m / s_r)      y = float(q W^T) * s_r * out_scale + bias
 *
 * x [M, K] and y [M, N] float32 or bfloat16, W int8 [N, K], all row-major; m [K], out_scale, quant_bias, bias [N].
 * All float arithmetic is float32 in the order written here, so results equal those of the reference kernel bit by bit.
 *
 * Built twice, for the two instruction sets of int8_x86.h. First all rows are quantized, then tiles of ROWS x COLUMNS
 * sums are kept in registers over blocks of K that leave the panel in the second-level cache. The panels of W, all of
 * ceil(N/COLUMNS), lie one after the other.
 */
#include "int8_x86.h"

enum { ROW_BLOCK = 96, K_BLOCK = 2048 / GROUP, WIDE_BLOCK = 512 };

/* Fewer products are done before a second thread has woken up. */
enum { FOR_ONE_THREAD = 1 << 21 };

typedef struct {
    const void *x;             /* [M, K] */
    void *y;                   /* [M, N] */
    const packed_t *packed;    /* see above */
    const int32_t *start;      /* [padded N], what each sum starts from: -CODE_OFFSET * sum_k W */
    const float *mul;          /* [K] or NULL */
    const float *input_scale;  /* [1], or NULL: one scale per row */
    const float *input_offset; /* [1], or NULL */
    const float *out_scale;    /* [N] */
    const int32_t *quant_bias; /* [N], or NULL */
    const float *bias;         /* [N], or NULL */
    float smallest_scale;      /* of a row whose inputs are all zero */
    int32_t is_bfloat;         /* of x and y */
    int64_t m, n, k;
} Job;

static int64_t panels_of(int64_t n) { return (n + COLUMNS - 1) / COLUMNS; }

int64_t hyq_packed_bytes(int64_t n, int64_t k) {
    return panels_of(n) * COLUMNS * (groups_of(k) * GROUP * (int64_t)sizeof(packed_t) + (int64_t)sizeof(int32_t));
}

/* The packed weight followed by what each sum starts from. */
void hyq_pack_weight(const int8_t *weight, void *packed, int64_t n, int64_t k) {
    const int64_t groups = groups_of(k), width = panels_of(n) * COLUMNS;
    packed_t *panels = packed;
    int32_t *start = (int32_t *)(panels + width * groups * GROUP);
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels_of(n); panel++) {
        packed_t *out = panels + panel * groups * COLUMNS * GROUP;
        memset(out, 0, sizeof(packed_t) * groups * COLUMNS * GROUP);
        for (int64_t lane = 0; lane < COLUMNS; lane++) {
            const int64_t column = panel * COLUMNS + lane;
            int32_t sum = 0;
            for (int64_t i = 0; column < n && i < k; i++) {
                out[(i / GROUP * COLUMNS + lane) * GROUP + i % GROUP] = weight[column * k + i];
                sum += weight[column * k + i];
            }
            start[column] = -CODE_OFFSET * sum;
        }
    }
}

/* Write one row as float32, multiplied by `mul` if there is one. */
static const float *float_row(const Job *job, int64_t row, float *buffer) {
    const int64_t k = job->k;
    const float *x = (const float *)job->x + row * k;
    const uint16_t *half = (const uint16_t *)job->x + row * k;
    if (!job->is_bfloat && !job->mul) return x;
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        floats value = job->is_bfloat ? load_bfloat(half + i) : load_float(x + i);
        if (job->mul) value = mul_float(value, load_float(job->mul + i));
        store_float(buffer + i, value);
    }
    for (; i < k; i++) {
        const float value = job->is_bfloat ? bfloat_at(half + i) : x[i];
        buffer[i] = job->mul ? value * job->mul[i] : value;
    }
    return buffer;
}

/* Magnitudes are compared as integers, in whose order infinity and then NaN come last: a row with one has no finite scale. */
static float row_scale(const float *x, int64_t k, float largest_code, float smallest) {
    const integers magnitude = set_int(0x7fffffff);
    integers even = set_int(0), odd = set_int(0);
    int64_t i = 0;
    for (; i + 2 * LANES <= k; i += 2 * LANES) {
        even = max_int(even, and_int(load_int(x + i), magnitude));
        odd = max_int(odd, and_int(load_int(x + i + LANES), magnitude));
    }
    int32_t lanes[LANES], top = 0;
    store_int(lanes, max_int(even, odd));
    for (int lane = 0; lane < LANES; lane++) top = lanes[lane] > top ? lanes[lane] : top;
    for (; i < k; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float largest;
    memcpy(&largest, &top, sizeof largest);
    const float scale = largest / largest_code;
    return scale < smallest ? smallest : scale;
}

/* Write `width` outputs from the sums of one row; the tensors start at its first column. */
static void dequantize_row(const Job *job, const int32_t *sums, float row_scale, int64_t row, int64_t column, int64_t width) {
    const float *out_scale = job->out_scale + column, *bias = job->bias ? job->bias + column : NULL;
    const int32_t *quant_bias = job->quant_bias ? job->quant_bias + column : NULL;
    float *y = (float *)job->y + row * job->n + column;
    uint16_t *half = (uint16_t *)job->y + row * job->n + column;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        integers sum = load_int(sums + i);
        if (quant_bias) sum = add_int(sum, load_int(quant_bias + i));
        floats value = to_float(sum);
        if (!job->input_scale) value = mul_float(value, set_float(row_scale));
        value = mul_float(value, load_float(out_scale + i));
        if (bias) value = add_float(value, load_float(bias + i));
        if (job->is_bfloat) store_bfloat(half + i, round_to_bfloat(value));
        else store_float(y + i, value);
    }
    for (; i < width; i++) {
        float value = (float)(quant_bias ? sums[i] + quant_bias[i] : sums[i]);
        if (!job->input_scale) value = value * row_scale;
        value = value * out_scale[i];
        if (bias) value = value + bias[i];
        if (job->is_bfloat) {
            float lanes[LANES] = {value};
            uint16_t halves[LANES];
            store_bfloat(halves, round_to_bfloat(load_float(lanes)));
            half[i] = halves[0];
        } else y[i] = value;
    }
}

/* Compute rows [row, row + rows) of the columns of one panel. Sums wait in memory only between blocks of K. */
static void run_panel(const Job *job, const code_t *codes, const float *scales, int64_t row, int64_t rows, int64_t panel) {
    const int64_t groups = groups_of(job->k), stride = groups * GROUP, column = panel * COLUMNS;
    const int64_t width = job->n - column < COLUMNS ? job->n - column : COLUMNS;
    const packed_t *weights = job->packed + panel * groups * COLUMNS * GROUP;
    int32_t sums[ROW_BLOCK * COLUMNS] __attribute__((aligned(64)));
    for (int64_t g = 0; g < groups; g += K_BLOCK) {
        const int64_t block = groups - g < K_BLOCK ? groups - g : K_BLOCK;
        for (int64_t r = 0; r < rows; r += ROWS) {
            int32_t *tile = groups > K_BLOCK ? sums + r * COLUMNS : sums;
            multiply_tile(codes + (row + r) * stride + g * GROUP, stride, weights + g * COLUMNS * GROUP, block,
                          g == 0 ? job->start + column : tile, g == 0 ? 0 : COLUMNS, tile);
            for (int64_t i = 0; g + block == groups && i < ROWS && row + r + i < job->m; i++)
                dequantize_row(job, tile + i * COLUMNS, scales[row + r + i], row + r + i, column, width);
        }
    }
}

/* Return 0, or 1 when memory for the codes was refused (y is then untouched). */
int hyq_int8_linear(const void *x, const void *packed, void *y, int64_t m, int64_t n, int64_t k, const float *mul,
                    const float *input_scale, const float *input_offset, const float *out_scale,
                    const int32_t *quant_bias, const float *bias, float largest_code, float smallest_scale, int is_bfloat,
                    int threads) {
    const int64_t groups = groups_of(k), stride = groups * GROUP, panels = panels_of(n);
    const int64_t padded = (m + ROWS - 1) / ROWS * ROWS;
    const packed_t *weights = packed;
    const Job job = {x, y, weights, (const int32_t *)(weights + panels * COLUMNS * stride), mul, input_scale, input_offset,
                     out_scale, quant_bias, bias, smallest_scale, is_bfloat, m, n, k};
    const float offset = input_offset ? *input_offset : 0.0f;
    code_t *codes = aligned_alloc(64, (sizeof(code_t) * padded * stride + 63) / 64 * 64 + 64);
    float *scales = malloc(sizeof(float) * (padded + 1));
    float *buffers = malloc(sizeof(float) * k * threads);
    const int failed = !codes || !scales || !buffers;
    const int64_t row_blocks = (m + ROW_BLOCK - 1) / ROW_BLOCK, wide = WIDE_BLOCK / COLUMNS;
    const int64_t panel_blocks = (panels + wide - 1) / wide;
    if (!failed) {
        memset(codes + m * stride, 0, sizeof(code_t) * (padded - m) * stride);
#pragma omp parallel num_threads(threads) if (m * n * k > FOR_ONE_THREAD)
        {
#ifdef _OPENMP
            extern int omp_get_thread_num(void);
            float *buffer = buffers + omp_get_thread_num() * k;
#else
            float *buffer = buffers;
#endif
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m; row++) {
                const float *values = float_row(&job, row, buffer);
                scales[row] = input_scale ? *input_scale : row_scale(values, k, largest_code, smallest_scale);
                quantize_row(values, k, scales[row], offset, codes + row * stride);
            }
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t block = 0; block < panel_blocks; block++)
                for (int64_t rows = 0; rows < row_blocks; rows++) {
                    const int64_t row = rows * ROW_BLOCK, last = (block + 1) * wide < panels ? (block + 1) * wide : panels;
                    const int64_t count = padded - row < ROW_BLOCK ? padded - row : ROW_BLOCK;
                    for (int64_t panel = block * wide; panel < last; panel++)
                        run_panel(&job, codes, scales, row, count, panel);
                }
        }
    }
    free(codes);
    free(scales);
    free(buffers);
    return failed;
}
