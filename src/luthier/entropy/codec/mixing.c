/* Context mixing: the probability of every next bit from many predictions, and the range coder that spends it.

   mixing_reference.py says the same slowly, in the same order and under the same names, and gives the same bytes. All
   arithmetic is on integers; >> of a negative number rounds down, as every compiler in use does it.

   Units: p22 and p16 are probabilities of a one in 2^-22 and 2^-16; a logit is ln(p / (1 - p)) in 1/256; a weight of
   65536 is one. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CONTEXTS 11
#define INPUTS 32
#define SETS 7
#define TOP 2815        /* largest logit: 11 nats */
#define MOST 524287     /* largest weight: 8 */
#define SHORTEST 6      /* bytes of a match */
#define LONGEST 60
#define MATCH_BITS 20
#define CURVE 33        /* points of a refinement curve over the logit */
#define STREAMS 32

enum { ORDER0 = 22, ORDER1, MATCH, MATCH_SIZE, BIAS, NETWORK, REFINED };

static const int SIZES[SETS] = {256, 264, 2048, 64, 512, 2048, 25};

typedef struct {
    const int16_t *stretch;     /* [4096] p12 -> logit */
    const uint16_t *squash;     /* [2 TOP + 2] logit + TOP + 1 -> p16 */
    const uint32_t *reciprocal; /* [1024] how far a map moves after so many visits, in 2^-16 */
    const uint8_t *next;        /* [256][2] history after a zero and a one */
    const uint32_t *histories;  /* [256] first probability of a history: p22 << 10 */
    const uint32_t *matches;    /* [32][2] first probability of a one after a match of this class that expects 0, 1 */
    const int32_t *weights;     /* [INPUTS] first weights of the mixers */
    const uint8_t *class;       /* [256] kind of a byte, below 8 */
    const uint8_t *letter;      /* [256] 0 for what is no part of a word, or else its lower case */
} Tables;

typedef struct {
    int64_t position, end, first; /* next byte, end and start of the stream, in the text */
    int64_t pointer;              /* what the match says comes next; used while length > 0 */
    int32_t length;
    uint32_t recent, older;       /* the last four bytes, and the four before them */
    uint32_t word, word1, word2;  /* hashes of the current word and of the two before it */
} Stream;

typedef struct {
    Tables t;
    uint8_t *slots;               /* histories by context: 16 bytes, a check and those of the 15 nodes of a nibble */
    uint32_t slot_mask;
    uint32_t *positions;          /* where the hash of the last bytes was seen last */
    uint32_t histories[CONTEXTS][256], matches[64], order0[256], order1[65536], refined[128 * 8];
    int32_t *weights[SETS], last[256][8];
    uint16_t curve0[256][CURVE], curve2[65536][CURVE];
    Stream streams[STREAMS];
    int64_t stream_count, stream_bytes, start;
    uint8_t *text, *payload;      /* one of them is read, the other written */
    int64_t used, capacity;
    uint32_t range, code;
    uint64_t low;
    int decoding, full;
} Mixing;

static uint32_t mixed(uint32_t h) {
    h *= 0x85EBCA6Bu;
    h ^= h >> 15;
    h *= 0xC2B2AE35u;
    return h ^ (h >> 13);
}

static int clamped(int logit) { return logit > TOP ? TOP : logit < -TOP - 1 ? -TOP - 1 : logit; }

static void learn(const Mixing *m, uint32_t *entry, int bit, uint32_t most) { /* p22 << 10 | visits */
    const int64_t p = *entry >> 10;
    const uint32_t visits = *entry & 1023;
    const int64_t moved = p + (((((int64_t)bit << 22) - p) * m->t.reciprocal[visits]) >> 16);
    *entry = (uint32_t)moved << 10 | (visits < most ? visits + 1 : visits);
}

static uint8_t *find(Mixing *m, uint32_t hash) { /* the slot of a context; a missing one replaces the least used */
    const uint8_t check = hash >> 24 ? hash >> 24 : 1;
    uint8_t *line = m->slots + (size_t)((hash * 0x9E3779B1u) & m->slot_mask & ~3u) * 16, *worst = NULL;
    for (uint32_t k = 0; k < 4; k++) {
        uint8_t *slot = line + 16 * (((hash >> 20) + k) & 3);
        if (slot[0] == check) return slot;
        if (!worst || slot[1] < worst[1]) worst = slot;
    }
    memset(worst, 0, 16);
    worst[0] = check;
    return worst;
}

static int code_bit(Mixing *m, int bit, int p16) {
    const uint32_t bound = (uint32_t)(((uint64_t)m->range * (uint32_t)p16) >> 16);
    if (m->decoding) bit = m->code < bound;
    if (bit) {
        m->range = bound;
    } else {
        m->range -= bound;
        if (m->decoding) m->code -= bound;
        else m->low += bound;
    }
    if (m->low >> 32) { /* carry */
        int64_t i = m->used;
        while (i > 0 && ++m->payload[--i] == 0) {}
        m->low &= 0xFFFFFFFFu;
    }
    while (m->range < 1u << 24) {
        m->range <<= 8;
        if (m->decoding) {
            m->code = m->code << 8 | (m->used < m->capacity ? m->payload[m->used] : 0);
            m->used++;
        } else if (m->used < m->capacity) {
            m->payload[m->used++] = (uint8_t)(m->low >> 24);
            m->low = (m->low << 8) & 0xFFFFFFFFu;
        } else {
            m->full = 1;
        }
    }
    return bit;
}

static void hash_contexts(const Stream *s, uint32_t *hashes) {
    const uint32_t a = 0x2F0B4C47u, b = 0x3D4D51CBu, c = s->recent, byte = c & 255;
    const uint32_t contexts[CONTEXTS] = {
        byte,
        c & 0xFFFF,
        c & 0xFFFFFF,
        c,
        c * a + (s->older & 0xFF),
        c * a + (s->older & 0xFFFF) * 3,
        s->word * 0x01000193u + byte,
        s->word * a + s->word1 * b + byte,
        (c & 0xFFFF00) * a,
        (c * a) ^ (s->older * b),
        s->word * a + s->word1 * b + s->word2 * 0x7F4A7C15u,
    };
    for (uint32_t i = 0; i < CONTEXTS; i++) hashes[i] = mixed(contexts[i] + i * 0x632BE5ABu);
}

static int known(const Mixing *m, int64_t position) { /* whether a byte of the text is decoded already */
    if (position < m->start) return 1;
    const int64_t stream = (position - m->start) / m->stream_bytes;
    return stream < m->stream_count && position < m->streams[stream].position;
}

static void find_match(Mixing *m, Stream *s) {
    const uint32_t hash = mixed(s->recent * 0x2F0B4C47u ^ (s->older & 0xFFFF) * 0x3D4D51CBu) >> (32 - MATCH_BITS);
    if (s->length && !known(m, s->pointer)) s->length = 0;
    if (s->position - s->first < SHORTEST) return;
    const int64_t found = m->positions[hash];
    m->positions[hash] = (uint32_t)s->position;
    if (s->length || !found || !known(m, found)) return;
    const int64_t first = found < m->start ? 0 : m->start + (found - m->start) / m->stream_bytes * m->stream_bytes;
    const uint8_t *now = m->text + s->position - 1, *then = m->text + found - 1;
    while (s->length < LONGEST && s->length < found - first && s->length < s->position - s->first &&
           now[-s->length] == then[-s->length])
        s->length++;
    if (s->length < SHORTEST) s->length = 0;
    s->pointer = found;
}

static void advance(const Mixing *m, Stream *s, int byte) { /* after a byte that is in the text already */
    s->position++;
    s->older = s->older << 8 | s->recent >> 24;
    s->recent = s->recent << 8 | (uint32_t)byte;
    if (s->length) {
        s->pointer++;
        if (s->length < LONGEST) s->length++;
    }
    const uint32_t letter = m->t.letter[byte];
    if (letter) {
        s->word = (s->word + letter + 1) * 0x2F0B4C47u;
        s->word ^= s->word >> 15;
    } else if (s->word) {
        s->word2 = s->word1;
        s->word1 = s->word;
        s->word = 0;
    }
}

static int dot(const int32_t *weights, const int32_t *inputs, int count) {
    int32_t sum = 0;
    for (int i = 0; i < count; i++) sum += (weights[i] * inputs[i]) >> 8;
    return clamped(sum >> 8);
}

static void train(int32_t *weights, const int32_t *inputs, int32_t error, int count) {
    for (int i = 0; i < count; i++) {
        int32_t w = weights[i] + ((inputs[i] * error + 32768) >> 16);
        w = w > MOST ? MOST : w;
        weights[i] = w < -MOST ? -MOST : w;
    }
}

static uint16_t *curve_at(uint16_t *curve, int logit, int *weight) { /* the point below, and how near the next is */
    const int at = logit + 2048 < 0 ? 0 : logit + 2048 > 4095 ? 4095 : logit + 2048;
    *weight = at & 127;
    return curve + (at >> 7);
}

static void bend(uint16_t *point, int bit) {
    for (int k = 0; k < 2; k++) point[k] = (uint16_t)(point[k] + (((bit ? 65535 : 0) - point[k]) >> 6));
}

static int code_byte(Mixing *m, Stream *s, const uint32_t *counts) {
    uint32_t hashes[CONTEXTS];
    uint8_t *slots[CONTEXTS];
    uint64_t tree[512];
    if (counts) {
        for (int i = 0; i < 256; i++) tree[256 + i] = counts[i];
        for (int i = 255; i > 0; i--) tree[i] = tree[2 * i] + tree[2 * i + 1];
    }
    hash_contexts(s, hashes);
    for (int i = 0; i < CONTEXTS; i++) slots[i] = find(m, hashes[i]);
    find_match(m, s);
    const uint32_t byte1 = s->recent & 255, byte2 = s->recent >> 8 & 255;
    const int expected = s->length ? m->text[s->pointer] | 256 : 0, wanted = m->decoding ? 0 : m->text[s->position];
    const int kinds = m->t.class[byte1] * 8 + m->t.class[byte2];
    int node = 1; /* a one, then the bits so far */
    for (int place = 0; place < 8; place++) {
        if (place == 4)
            for (int i = 0; i < CONTEXTS; i++) slots[i] = find(m, mixed(hashes[i] ^ (uint32_t)node * 0x9E3779B1u));
        const int in_nibble = place < 4 ? node : (node & ((1 << (place - 4)) - 1)) | 1 << (place - 4);
        int32_t inputs[INPUTS] = {0}, outputs[8] = {0};
        int seen = 0, match = -1, doubt = 0;
        for (int i = 0; i < CONTEXTS; i++) {
            const int history = slots[i][in_nibble], p12 = (int)(m->histories[i][history] >> 20);
            if (!history) continue;
            inputs[2 * i] = m->t.stretch[p12];
            inputs[2 * i + 1] = p12 - 2048;
            seen += i < 6 || i == 9;
        }
        inputs[ORDER0] = m->t.stretch[m->order0[node] >> 20];
        inputs[ORDER1] = m->t.stretch[m->order1[byte1 << 8 | (uint32_t)node] >> 20];
        inputs[BIAS] = 256;
        if (s->length && expected >> (8 - place) == node) {
            const int size = s->length < 16 ? s->length : 16 + ((s->length - 16) >> 2);
            match = 2 * size + ((expected >> (7 - place)) & 1);
            inputs[MATCH] = m->t.stretch[m->matches[match] >> 20];
            inputs[MATCH_SIZE] = (int)(m->matches[match] >> 20) - 2048;
        }
        if (counts) {
            const int p12 = tree[node] ? (int)((tree[2 * node + 1] * 4095) / tree[node]) : 2048;
            const int logit = m->t.stretch[p12];
            doubt = 1 + (logit + 2304) / 192;
            inputs[NETWORK] = logit;
            inputs[REFINED] = m->t.stretch[m->refined[((logit + 2304) / 36) * 8 + seen] >> 20];
        }
        const int selected[SETS] = {node, (match < 0 ? 0 : 1 + match / 2) * 8 + place, (int)byte1 * 8 + place,
                                    seen * 8 + place, kinds * 8 + place, (int)byte2 * 8 + place, doubt};
        for (int k = 0; k < SETS; k++) outputs[k] = dot(m->weights[k] + selected[k] * INPUTS, inputs, INPUTS);
        const int logit = dot(m->last[node], outputs, 8), p = m->t.squash[logit + TOP + 1];
        int near = 0;
        uint16_t *point0 = curve_at(m->curve0[node], logit, &near);
        uint16_t *point2 = curve_at(m->curve2[mixed((s->recent & 0xFFFF) * 256 + (uint32_t)node) >> 16], logit, &near);
        const int refined0 = (point0[0] * (128 - near) + point0[1] * near) >> 7;
        const int refined2 = (point2[0] * (128 - near) + point2[1] * near) >> 7;
        const int p16 = (2 * p + refined0 + refined2 + 2) >> 2;
        const int bit = code_bit(m, wanted >> (7 - place) & 1, p16 < 1 ? 1 : p16 > 65535 ? 65535 : p16);
        for (int k = 0; k < SETS; k++) {
            const int error = (((bit << 16) - m->t.squash[outputs[k] + TOP + 1]) * 14) >> 6;
            train(m->weights[k] + selected[k] * INPUTS, inputs, error, INPUTS);
        }
        train(m->last[node], outputs, ((bit << 16) - p) >> 3, 8);
        bend(point0, bit);
        bend(point2, bit);
        for (int i = 0; i < CONTEXTS; i++) {
            uint8_t *history = slots[i] + in_nibble;
            learn(m, &m->histories[i][*history], bit, 1023);
            *history = m->t.next[2 * *history + bit];
        }
        learn(m, &m->order0[node], bit, 255);
        learn(m, &m->order1[byte1 << 8 | (uint32_t)node], bit, 255);
        if (counts) learn(m, &m->refined[((inputs[NETWORK] + 2304) / 36) * 8 + seen], bit, 1023);
        if (match >= 0) {
            learn(m, &m->matches[match], bit, 1023);
            if ((match & 1) != bit) s->length = 0;
        }
        node = 2 * node + bit;
    }
    return node & 255;
}

void mixing_reset(Mixing *m) { /* forget everything */
    memset(m->slots, 0, ((size_t)m->slot_mask + 1) * 16);
    memset(m->positions, 0, sizeof(uint32_t) << MATCH_BITS);
    for (int i = 0; i < CONTEXTS; i++) memcpy(m->histories[i], m->t.histories, sizeof m->histories[i]);
    memcpy(m->matches, m->t.matches, sizeof m->matches);
    for (int i = 0; i < 256; i++) m->order0[i] = 1u << 31;
    for (int i = 0; i < 65536; i++) m->order1[i] = 1u << 31;
    for (int i = 0; i < 128 * 8; i++) {
        const int logit = i / 8 * 36 - 2286;
        m->refined[i] = (uint32_t)m->t.squash[clamped(logit) + TOP + 1] << 16;
    }
    for (int k = 0; k < SETS; k++)
        for (int i = 0; i < SIZES[k]; i++) memcpy(m->weights[k] + i * INPUTS, m->t.weights, sizeof(int32_t) * INPUTS);
    for (int i = 0; i < 256; i++)
        for (int k = 0; k < 8; k++) m->last[i][k] = k < SETS ? 65536 / SETS : 0;
    uint16_t curve[CURVE];
    for (int k = 0; k < CURVE; k++) curve[k] = m->t.squash[clamped((k - 16) * 128) + TOP + 1];
    for (int i = 0; i < 256; i++) memcpy(m->curve0[i], curve, sizeof curve);
    for (int i = 0; i < 65536; i++) memcpy(m->curve2[i], curve, sizeof curve);
}

void mixing_free(Mixing *m) {
    if (!m) return;
    for (int k = 0; k < SETS; k++) free(m->weights[k]);
    free(m->slots);
    free(m->positions);
    free(m);
}

Mixing *mixing_new(const Tables *tables, int64_t slot_bits) { /* NULL where the memory is not to be had */
    Mixing *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    m->t = *tables;
    m->slot_mask = (uint32_t)(((uint64_t)1 << slot_bits) - 1);
    m->slots = aligned_alloc(64, (size_t)16 << slot_bits);
    m->positions = malloc(sizeof(uint32_t) << MATCH_BITS);
    int missing = !m->slots || !m->positions;
    for (int k = 0; k < SETS; k++)
        missing |= !(m->weights[k] = aligned_alloc(64, sizeof(int32_t) * INPUTS * (size_t)SIZES[k]));
    if (missing) {
        mixing_free(m);
        return NULL;
    }
    mixing_reset(m);
    return m;
}

/* Learn what another state has learned; both have as many slots. The frame that it is in does not come along. */
void mixing_copy(Mixing *m, const Mixing *other) {
    uint8_t *slots = m->slots;
    uint32_t *positions = m->positions;
    int32_t *weights[SETS];
    memcpy(weights, m->weights, sizeof weights);
    *m = *other;
    m->slots = slots;
    m->positions = positions;
    memcpy(m->weights, weights, sizeof weights);
    memcpy(m->slots, other->slots, ((size_t)m->slot_mask + 1) * 16);
    memcpy(m->positions, other->positions, sizeof(uint32_t) << MATCH_BITS);
    for (int k = 0; k < SETS; k++)
        memcpy(m->weights[k], other->weights[k], sizeof(int32_t) * INPUTS * (size_t)SIZES[k]);
}

/* Start a frame: text[start .. start + bytes) in `streams` pieces, after text[0 .. start), which both sides know.
   `shift` is how far the text has moved down since the last frame. */
void mixing_begin(Mixing *m, uint8_t *text, int64_t start, int64_t bytes, int64_t streams, int64_t shift,
                  uint8_t *payload, int64_t capacity, int decoding) {
    m->text = text;
    m->start = start;
    m->stream_count = streams;
    m->stream_bytes = (bytes + streams - 1) / streams;
    for (size_t i = 0; shift && i < (size_t)1 << MATCH_BITS; i++)
        m->positions[i] = m->positions[i] > shift ? (uint32_t)(m->positions[i] - shift) : 0;
    for (int64_t s = 0; s < streams; s++) {
        const int64_t first = s * m->stream_bytes, end = first + m->stream_bytes;
        Stream fresh = {0};
        fresh.first = fresh.position = start + (first < bytes ? first : bytes);
        fresh.end = start + (end < bytes ? end : bytes);
        m->streams[s] = fresh;
    }
    m->payload = payload;
    m->capacity = capacity;
    m->decoding = decoding;
    m->range = 0xFFFFFFFFu;
    m->low = m->code = 0;
    m->used = m->full = 0;
    if (decoding)
        for (; m->used < 4; m->used++) m->code = m->code << 8 | (m->used < capacity ? payload[m->used] : 0);
}

/* Code the next `steps` bytes of every stream; counts [streams, 256] are the network's for one step, or NULL.
   1 when the payload got too long. */
int mixing_run(Mixing *m, int64_t steps, const uint32_t *counts) {
    for (int64_t step = 0; step < steps && !m->full; step++)
        for (int64_t i = 0; i < m->stream_count; i++) {
            Stream *s = &m->streams[i];
            if (s->position >= s->end) continue;
            const int byte = code_byte(m, s, counts ? counts + 256 * i : NULL);
            m->text[s->position] = (uint8_t)byte;
            advance(m, s, byte);
        }
    return m->full;
}

int64_t mixing_finish(Mixing *m) { /* bytes of the payload: one more, of which the decoder reads zeros after it */
    m->low += (1u << 24) - 1;
    if (m->low >> 32) {
        int64_t i = m->used;
        while (i > 0 && ++m->payload[--i] == 0) {}
    }
    if (m->used >= m->capacity) m->full = 1;
    else m->payload[m->used++] = (uint8_t)(m->low >> 24);
    return m->full ? -1 : m->used;
}
