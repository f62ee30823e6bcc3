/* Scale and rotate rows of activations in place of K rounds of tensor operations: what decoding on a CPU needs.

   Every group of a row is read once, turned in fp32 on the stack, and written once. Tables are laid out in the order of
   reading: pairs (groups, rounds, G / 2, 2) uint8, cosines and sines (groups, rounds, G / 2) fp32, scales (channels). */

#include <stdint.h>
#include <string.h>

#define MAX_GROUP 256

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) { /* nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void turn(float *values, const uint8_t *pairs, const float *cosines, const float *sines, int steps) {
    for (int t = 0; t < steps; t++) {
        const int i = pairs[2 * t], j = pairs[2 * t + 1];
        const float a = values[i], b = values[j];
        values[i] = a * cosines[t] + b * sines[t];
        values[j] = b * cosines[t] - a * sines[t];
    }
}

void rotate_bf16(const uint16_t *x, uint16_t *out, const float *scales, const uint8_t *pairs, const float *cosines,
                 const float *sines, int64_t rows, int64_t groups, int64_t size, int64_t rounds) {
    const int steps = (int)(rounds * size / 2);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t group = 0; group < groups; group++) {
            float values[MAX_GROUP];
            const int64_t first = (row * groups + group) * size, table = group * steps;
            for (int c = 0; c < size; c++) values[c] = from_bf16(x[first + c]) * scales[group * size + c];
            turn(values, pairs + 2 * table, cosines + table, sines + table, steps);
            for (int c = 0; c < size; c++) out[first + c] = to_bf16(values[c]);
        }
}

void rotate_fp32(const float *x, float *out, const float *scales, const uint8_t *pairs, const float *cosines,
                 const float *sines, int64_t rows, int64_t groups, int64_t size, int64_t rounds) {
    const int steps = (int)(rounds * size / 2);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t group = 0; group < groups; group++) {
            const int64_t first = (row * groups + group) * size, table = group * steps;
            for (int c = 0; c < size; c++) out[first + c] = x[first + c] * scales[group * size + c];
            turn(out + first, pairs + 2 * table, cosines + table, sines + table, steps);
        }
}
