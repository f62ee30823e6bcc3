/* One byte further in B streams of the integer network: integer_reference.py says what is computed, this is its speed.

   Every number is an integer and every sum exact, so the two paths here (AVX2, and plain C for all other machines) and
   the reference give the same bits. Matrix products pair unsigned 8-bit inputs with 7-bit weights: two products stay
   below 2^15, so the saturating vpmaddubsw never saturates. Weights lie as (N / 16, K / 4, 16, 4), keys as
   (W / 8, H / 4, 8, 4), values as (W / 2, H, 2). Streams are split among threads, which share nothing but weights. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__) && !defined(LUTHIER_PORTABLE)
#include <immintrin.h>
#define AVX2 1
#endif

#define TABLES 6
#define RESIDUAL_LIMIT ((1 << 23) - 1)
#define HALF (1LL << 31)
#define SUM_SHIFT 4
#define SCORE_SHIFT 6
#define LOGIT_SHIFT 8
#define NEVER (-(1 << 28)) /* score of a place in the window that holds no key yet */
#define MAX_THREADS 64
#define MAX_HEAD 256

typedef struct { /* outputs[n] = (sum_k inputs[k] weights[n][k] - offsets[n]) scales[n] 2^shift / 2^32 */
    const int8_t *weights;
    const int32_t *offsets, *scales;
    int64_t inputs, outputs;
} Matrix;

typedef struct {
    Matrix queries_keys_values, out, up, down;
    const int32_t *distances; /* (heads, 2 W): score by W - age, twice round the ring */
    const int32_t *scores;    /* (heads): scale of a query times a key */
    int64_t attention_gain, query_gain, key_gain, mixed_gain, feed_gain;
} Layer;

typedef struct {
    const Layer *layers;
    Matrix head;
    const int8_t *tables[TABLES];
    int64_t table_scales[TABLES], table_bits[TABLES], orders[TABLES];
    const uint32_t *letters;
    int64_t num_layers, width, heads, head_width, hidden, window, head_gain;
} Network;

typedef struct {
    uint32_t *recent, *word, *before; /* (B) */
    uint8_t *keys;                    /* (layers, B, W, H) */
    int8_t *values;                   /* (layers, B, W, H) */
    int32_t *residual, *sums;         /* (B, D), (B, widest) */
    uint8_t *inputs;                  /* (B, widest) */
    int32_t *weights;                 /* (threads, W) */
    uint32_t *probabilities;          /* (B, 256) */
    int64_t streams, widest, position;
} State;

/* ---- arithmetic ---- */

static inline int32_t rescale(int32_t x, int32_t scale) { return (int32_t)(((int64_t)x * scale + HALF) >> 32); }

static inline int32_t clip(int32_t x, int32_t limit) { return x < -limit ? -limit : x > limit ? limit : x; }

static int64_t root(int64_t n) { /* floor of the square root; the floating-point guess is only where to start */
    int64_t r = (int64_t)sqrt((double)n);
    while (r * r > n) r--;
    while ((r + 1) * (r + 1) <= n) r++;
    return r;
}

static inline int32_t quotient(int64_t gain, int64_t divisor) {
    const int64_t q = gain / (divisor > 0 ? divisor : 1);
    return q > INT32_MAX ? INT32_MAX : (int32_t)q;
}

static inline int32_t power(int32_t u) { /* 2^(18 - f / 4096) for the low 12 bits f of u: a cubic, exact at both ends */
    const int32_t f = u & 4095;
    return ((((((-10254 * f) >> 12) + 60418) * f >> 12) - 181236) * f >> 12) + (1 << 18);
}

#ifdef AVX2
static inline __m256i rescale8(__m256i x, __m256i scales) {
    const __m256i half = _mm256_set1_epi64x(HALF);
    __m256i even = _mm256_add_epi64(_mm256_mul_epi32(x, scales), half);
    __m256i odd = _mm256_mul_epi32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(scales, 32));
    odd = _mm256_add_epi64(odd, half);
    return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
#endif

/* out[i] = x[i] 2^shift scales[i] / 2^32, rounded, for n a multiple of 8. */
static void rescale_row(const int32_t *x, const int32_t *scales, int32_t *out, int64_t n, int shift) {
#ifdef AVX2
    for (int64_t i = 0; i < n; i += 8) {
        const __m256i v = _mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(x + i)), shift);
        const __m256i m = _mm256_loadu_si256((const __m256i *)(scales + i));
        _mm256_storeu_si256((__m256i *)(out + i), rescale8(v, m));
    }
#else
    for (int64_t i = 0; i < n; i++) out[i] = rescale(x[i] * (1 << shift), scales[i]);
#endif
}

static void rescale_all(const int32_t *x, int32_t scale, int32_t *out, int64_t n, int shift) {
#ifdef AVX2
    const __m256i m = _mm256_set1_epi32(scale);
    for (int64_t i = 0; i < n; i += 8) {
        const __m256i v = _mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(x + i)), shift);
        _mm256_storeu_si256((__m256i *)(out + i), rescale8(v, m));
    }
#else
    for (int64_t i = 0; i < n; i++) out[i] = rescale(x[i] * (1 << shift), scale);
#endif
}

/* out[i] = x[i] gain / (2^32 |x|), rounded and clipped; may overwrite x. */
static void normalize(const int32_t *x, int32_t *out, int64_t n, int64_t gain, int32_t limit) {
    int64_t squares = 0;
    for (int64_t i = 0; i < n; i++) squares += (int64_t)x[i] * x[i];
    rescale_all(x, quotient(gain, root(squares)), out, n, 0);
    for (int64_t i = 0; i < n; i++) out[i] = clip(out[i], limit);
}

/* ---- matrix products ---- */

#ifdef AVX2
static inline __attribute__((always_inline)) void product_block(const uint8_t *x, int64_t stride, const Matrix *matrix,
                                                                int64_t n, int32_t *out, int64_t out_stride,
                                                                const int rows) {
    const int8_t *weights = matrix->weights + n * matrix->inputs;
    const __m256i one = _mm256_set1_epi16(1);
    __m256i sums[4][2];
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < matrix->inputs / 4; k++) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i *)(weights + 64 * k));
        const __m256i w1 = _mm256_loadu_si256((const __m256i *)(weights + 64 * k + 32));
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * stride + 4 * k, 4);
            const __m256i v = _mm256_set1_epi32(four);
            sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(_mm256_maddubs_epi16(v, w0), one));
            sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(_mm256_maddubs_epi16(v, w1), one));
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) {
            const __m256i offset = _mm256_loadu_si256((const __m256i *)(matrix->offsets + n + 8 * half));
            __m256i *target = (__m256i *)(out + r * out_stride + n + 8 * half);
            _mm256_storeu_si256(target, _mm256_sub_epi32(sums[r][half], offset));
        }
}
#else
static void product_block(const uint8_t *x, int64_t stride, const Matrix *matrix, int64_t n, int32_t *out,
                          int64_t out_stride, const int rows) {
    const int8_t *weights = matrix->weights + n * matrix->inputs;
    for (int r = 0; r < rows; r++) {
        int32_t sums[16] = {0};
        for (int64_t k = 0; k < matrix->inputs; k += 4) { /* sixteen sums at once, in the order of the weights */
            const uint8_t *in = x + r * stride + k;
            const int8_t *w = weights + 16 * k;
            for (int j = 0; j < 16; j++)
                sums[j] += in[0] * w[4 * j] + in[1] * w[4 * j + 1] + in[2] * w[4 * j + 2] + in[3] * w[4 * j + 3];
        }
        for (int j = 0; j < 16; j++) out[r * out_stride + n + j] = sums[j] - matrix->offsets[n + j];
    }
}
#endif

static void product(const uint8_t *x, int64_t stride, const Matrix *matrix, int32_t *out, int64_t rows) {
    for (int64_t n = 0; n < matrix->outputs; n += 16)
        for (int64_t r = 0; r < rows; r += 4) {
            const uint8_t *in = x + r * stride;
            int32_t *to = out + r * stride;
            switch (rows - r) {
            case 1: product_block(in, stride, matrix, n, to, stride, 1); break;
            case 2: product_block(in, stride, matrix, n, to, stride, 2); break;
            case 3: product_block(in, stride, matrix, n, to, stride, 3); break;
            default: product_block(in, stride, matrix, n, to, stride, 4);
            }
        }
}

/* Inputs of a matrix are unsigned. */
static void offset_inputs(const int32_t *restrict x, uint8_t *restrict inputs, int64_t n) {
    for (int64_t i = 0; i < n; i++) inputs[i] = (uint8_t)(clip(x[i], 127) + 128);
}

static void square_inputs(const int32_t *restrict x, uint8_t *restrict inputs, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const int32_t a = x[i] < 0 ? 0 : x[i] > 4095 ? 4095 : x[i];
        const int32_t squared = (a * a + (1 << 15)) >> 16;
        inputs[i] = (uint8_t)(squared > 255 ? 255 : squared);
    }
}

/* ---- attention of one stream ---- */

static void score(const uint8_t *keys, const int32_t *query, int32_t *out, int64_t size, int64_t window) {
#ifdef AVX2
    const __m256i one = _mm256_set1_epi16(1);
    __m256i fours[MAX_HEAD / 4];
    for (int64_t d = 0; d < size / 4; d++) {
        const int32_t *q = query + 4 * d;
        const uint32_t low = (uint8_t)q[0] | (uint32_t)(uint8_t)q[1] << 8;
        fours[d] = _mm256_set1_epi32((int32_t)(low | (uint32_t)(uint8_t)q[2] << 16 | (uint32_t)(uint8_t)q[3] << 24));
    }
    for (int64_t j = 0; j < window; j += 8, keys += 8 * size) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t d = 0; d < size / 4; d++) {
            const __m256i key = _mm256_loadu_si256((const __m256i *)(keys + 32 * d));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(key, fours[d]), one));
        }
        _mm256_storeu_si256((__m256i *)(out + j), sum);
    }
#else
    for (int64_t j = 0; j < window; j++) {
        int32_t sum = 0;
        for (int64_t d = 0; d < size; d++) sum += keys[j / 8 * 8 * size + d / 4 * 32 + j % 8 * 4 + d % 4] * query[d];
        out[j] = sum;
    }
#endif
}

/* Scores into weights of at most 2^14; returns their sum. */
static int64_t soften(int32_t *scores, const int32_t *distances, int32_t scale, int64_t filled, int64_t window) {
    rescale_all(scores, scale, scores, window, SCORE_SHIFT);
    int32_t best = INT32_MIN, sum = 0;
    for (int64_t j = 0; j < window; j++) {
        scores[j] = j < filled ? scores[j] + distances[j] : NEVER;
        best = scores[j] > best ? scores[j] : best;
    }
    for (int64_t j = 0; j < window; j++) {
        const int32_t below = best - scores[j], halvings = below >> 12;
        scores[j] = (power(below) >> 4) >> (halvings > 31 ? 31 : halvings);
        sum += scores[j];
    }
    return sum;
}

static void mix(const int8_t *values, const int32_t *weights, int32_t *out, int64_t size, int64_t window) {
#ifdef AVX2
    for (int64_t d = 0; d < size; d += 16) {
        __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                           _mm256_setzero_si256()};
        for (int64_t j = 0; j < window; j += 4)
            for (int64_t t = 0; t < 2; t++) { /* two chains of sums, so that none waits for itself */
                const __m256i pair = _mm256_set1_epi32(weights[j + 2 * t] | weights[j + 2 * t + 1] << 16);
                const __m128i *at = (const __m128i *)(values + (j + 2 * t) * size + 2 * d);
                const __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128(at));
                const __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128(at + 1));
                sums[t] = _mm256_add_epi32(sums[t], _mm256_madd_epi16(first, pair));
                sums[t + 2] = _mm256_add_epi32(sums[t + 2], _mm256_madd_epi16(second, pair));
            }
        _mm256_storeu_si256((__m256i *)(out + d), _mm256_add_epi32(sums[0], sums[1]));
        _mm256_storeu_si256((__m256i *)(out + d + 8), _mm256_add_epi32(sums[2], sums[3]));
    }
#else
    memset(out, 0, (size_t)size * sizeof *out);
    for (int64_t j = 0; j < window; j++)
        for (int64_t d = 0; d < size; d++) out[d] += weights[j] * values[j / 2 * 2 * size + 2 * d + j % 2];
#endif
}

/* sums: rescaled queries, key and value of this byte; outputs for all heads go to `mixed`, offset by 128. */
static void attend(const Network *net, const Layer *layer, const State *state, uint8_t *keys, int8_t *values,
                   int32_t *sums, int32_t *weights, uint8_t *mixed) {
    const int64_t size = net->head_width, heads = net->heads, window = net->window;
    const int64_t place = state->position % window;
    const int64_t filled = state->position + 1 < window ? state->position + 1 : window;
    int32_t *key = sums + heads * size, *value = key + size;
    normalize(key, key, size, layer->key_gain, 127);
    for (int64_t d = 0; d < size; d++) {
        keys[place / 8 * 8 * size + d / 4 * 32 + place % 8 * 4 + d % 4] = (uint8_t)(key[d] + 128);
        values[place / 2 * 2 * size + 2 * d + place % 2] = (int8_t)clip(value[d], 127);
    }
    for (int64_t h = 0; h < heads; h++) {
        int32_t *query = sums + h * size;
        normalize(query, query, size, layer->query_gain, 63);
        score(keys, query, weights, size, window);
        const int32_t *distances = layer->distances + h * 2 * window + window - place;
        const int64_t total = soften(weights, distances, layer->scores[h], filled, window);
        mix(values, weights, query, size, window);
        rescale_all(query, quotient(layer->mixed_gain, total), query, size, 0);
        offset_inputs(query, mixed + h * size, size);
    }
}

/* ---- one step of some streams ---- */

/* start: (D) rows of a segment code and a half, or NULL for the half alone. */
static void embed(const Network *net, State *state, const int32_t *start, int64_t b, uint8_t byte) {
    const uint32_t letter = net->letters[byte];
    if (letter == 0 && state->word[b] != 0) state->before[b] = state->word[b];
    state->word[b] = letter == 0 ? 0 : state->word[b] * 0x2F0B4C47u + letter;
    state->recent[b] = state->recent[b] << 8 | byte;
    const int64_t width = net->width;
    int32_t *restrict x = state->residual + b * width;
    for (int64_t d = 0; d < width; d++) x[d] = start ? start[d] : 128;
    for (int t = 0; t < TABLES; t++) {
        uint32_t key = state->recent[b];
        if (net->orders[t] < 4) key &= (1u << 8 * net->orders[t]) - 1;
        if (t == TABLES - 2) key = state->word[b];
        if (t == TABLES - 1) key = state->word[b] * 0x85EBCA6Bu + state->before[b];
        const uint32_t row = t == 0 ? key : key * 0x9E3779B1u >> (32 - net->table_bits[t]);
        const int8_t *restrict values = net->tables[t] + (int64_t)row * width;
        const int32_t scale = (int32_t)net->table_scales[t];
        for (int64_t d = 0; d < width; d++) x[d] += values[d] * scale;
    }
    for (int64_t d = 0; d < width; d++) x[d] >>= 8;
}

/* inputs = the normalized residual stream, offset by 128. */
static void enter(const Network *net, State *state, int64_t gain, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        int32_t *out = state->sums + b * state->widest;
        normalize(state->residual + b * net->width, out, net->width, gain, 127);
        offset_inputs(out, state->inputs + b * state->widest, net->width);
    }
}

static void multiply(State *state, const Matrix *matrix, int64_t first, int64_t last, int shift) {
    int32_t *sums = state->sums + first * state->widest;
    product(state->inputs + first * state->widest, state->widest, matrix, sums, last - first);
    for (int64_t b = first; b < last; b++, sums += state->widest)
        rescale_row(sums, matrix->scales, sums, matrix->outputs, shift);
}

static void leave(const Network *net, State *state, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        int32_t *restrict x = state->residual + b * net->width;
        const int32_t *restrict sums = state->sums + b * state->widest;
        for (int64_t d = 0, width = net->width; d < width; d++) x[d] = clip(x[d] + sums[d], RESIDUAL_LIMIT);
    }
}

static void square(const Network *net, State *state, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++)
        square_inputs(state->sums + b * state->widest, state->inputs + b * state->widest, net->hidden);
}

static void predict(const State *state, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++) {
        const int32_t *logits = state->sums + b * state->widest;
        uint32_t *out = state->probabilities + b * 256;
        int32_t best = logits[0];
        for (int c = 1; c < 256; c++) best = logits[c] > best ? logits[c] : best;
        for (int c = 0; c < 256; c++) {
            const int32_t below = best - logits[c], halvings = below >> 12;
            out[c] = (uint32_t)((power(below) << 5) >> (halvings > 31 ? 31 : halvings)) + 1;
        }
    }
}

static void step_streams(const Network *net, State *state, const uint8_t *bytes, const int32_t *start, int64_t thread,
                         int64_t first, int64_t last) {
    const int64_t ring = net->window * net->head_width;
    for (int64_t b = first; b < last; b++) embed(net, state, start, b, bytes[b]);
    for (int64_t l = 0; l < net->num_layers; l++) {
        const Layer *layer = net->layers + l;
        enter(net, state, layer->attention_gain, first, last);
        multiply(state, &layer->queries_keys_values, first, last, SUM_SHIFT);
        for (int64_t b = first; b < last; b++) {
            const int64_t at = (l * state->streams + b) * ring;
            attend(net, layer, state, state->keys + at, state->values + at, state->sums + b * state->widest,
                   state->weights + thread * net->window, state->inputs + b * state->widest);
        }
        multiply(state, &layer->out, first, last, SUM_SHIFT);
        leave(net, state, first, last);
        enter(net, state, layer->feed_gain, first, last);
        multiply(state, &layer->up, first, last, SUM_SHIFT);
        square(net, state, first, last);
        multiply(state, &layer->down, first, last, SUM_SHIFT);
        leave(net, state, first, last);
    }
    enter(net, state, net->head_gain, first, last);
    multiply(state, &net->head, first, last, LOGIT_SHIFT);
    predict(state, first, last);
}

/* ---- threads that wait for the next step ---- */

typedef struct Pool Pool;

typedef struct {
    Pool *pool;
    pthread_t thread;
    int64_t number;
} Worker;

struct Pool {
    pthread_mutex_t lock;
    pthread_cond_t begin, end;
    Worker workers[MAX_THREADS];
    int64_t threads, round, running;
    int stopping;
    const Network *net;
    State *state;
    const uint8_t *bytes;
    const int32_t *start;
};

static void share(Pool *pool, int64_t number) {
    const int64_t streams = pool->state->streams, threads = pool->threads;
    step_streams(pool->net, pool->state, pool->bytes, pool->start, number, streams * number / threads,
                 streams * (number + 1) / threads);
}

static void *work(void *argument) {
    Worker *worker = argument;
    Pool *pool = worker->pool;
    int64_t seen = 0;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->round == seen && !pool->stopping) pthread_cond_wait(&pool->begin, &pool->lock);
        if (pool->stopping) break;
        seen = pool->round;
        pthread_mutex_unlock(&pool->lock);
        share(pool, worker->number);
        pthread_mutex_lock(&pool->lock);
        if (--pool->running == 0) pthread_cond_signal(&pool->end);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

void pool_close(Pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->stopping = 1;
    pthread_cond_broadcast(&pool->begin);
    pthread_mutex_unlock(&pool->lock);
    for (int64_t i = 1; i < pool->threads; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->begin);
    pthread_cond_destroy(&pool->end);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

/* `threads` in all, of which the caller is one; NULL where they cannot be had. */
Pool *pool_open(int64_t threads) {
    if (threads < 1 || threads > MAX_THREADS) return NULL;
    Pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL) return NULL;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->begin, NULL);
    pthread_cond_init(&pool->end, NULL);
    for (pool->threads = 1; pool->threads < threads; pool->threads++) {
        Worker *worker = pool->workers + pool->threads;
        worker->pool = pool;
        worker->number = pool->threads;
        if (pthread_create(&worker->thread, NULL, work, worker) != 0) {
            pool_close(pool);
            return NULL;
        }
    }
    return pool;
}

/* Read one byte of each stream, whose residual streams begin with `start`, and fill in the probabilities of the next. */
void pool_step_from(Pool *pool, const Network *net, State *state, const uint8_t *bytes, const int32_t *start) {
    pool->net = net;
    pool->state = state;
    pool->bytes = bytes;
    pool->start = start;
    if (pool->threads > 1) {
        pthread_mutex_lock(&pool->lock);
        pool->running = pool->threads - 1;
        pool->round++;
        pthread_cond_broadcast(&pool->begin);
        pthread_mutex_unlock(&pool->lock);
    }
    share(pool, 0);
    if (pool->threads > 1) {
        pthread_mutex_lock(&pool->lock);
        while (pool->running > 0) pthread_cond_wait(&pool->end, &pool->lock);
        pthread_mutex_unlock(&pool->lock);
    }
    state->position++;
}

/* The same of streams without a segment code. */
void pool_step(Pool *pool, const Network *net, State *state, const uint8_t *bytes) {
    pool_step_from(pool, net, state, bytes, NULL);
}
