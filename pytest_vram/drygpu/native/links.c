/* Computes how much memory NCCL takes on a card for the connections between ranks.
 *
 * A connection is one channel from one rank to another. Where the cards reach each other's memory, the receiver holds
 * the buffers of NCCL's three protocols on its card, and the sender a block with its counters; each is rounded up to
 * 2 MiB. NCCL may keep one of the three buffers at the sender instead, and the two blocks then add up to the same size.
 * The sizes are those of NCCL's transport/p2p.cc and init.cc, the same from 2.18 to 2.30, with the environment variables
 * that NCCL documents. Where cards do not reach each other's memory, the buffers are in the host's shared memory.
 *
 * NCCL derives the number of channels from the links between the cards. The card table has the number that it reported
 * on machines with such cards.
 */
#include "dry.h"

#include <stdlib.h>
#include <string.h>

enum {
    BLOCK = 2 << 20,                /* CUDA's granularity for memory that processes share */
    COUNTERS = 4096,                /* ncclSendMem and ncclRecvMem */
    SIMPLE = 4 << 20,               /* NCCL_BUFFSIZE */
    LL = 8 * 512 * 8 * 16,          /* lines of 16 bytes: 8 for each of 512 threads, in 8 steps */
    LL128 = 120 * 640 * 8 * 8,      /* words of 8 bytes: 120 for each of 640 threads, in 8 steps */
    CONNECTS_WHEN_NEEDED = 22200,   /* before NCCL 2.22 the trees of all-reduce are connected at once, needed or not */
};

static size_t setting(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    char *end;
    long long value = text == NULL ? -1 : strtoll(text, &end, 0);
    return value < 0 || end == text ? otherwise : (size_t)value;
}

static size_t blocks(size_t bytes) { return (bytes + BLOCK - 1) / BLOCK * BLOCK; }

static size_t limited(size_t channels, const char *least, const char *most) {
    size_t low = least == NULL ? 0 : setting(least, 0), high = setting(most, channels);
    channels = channels > high ? high : channels;
    return channels < low ? low : channels;
}

static int cards_reach_each_other(void) {
    return dry_the_card()->ring_channels > 0 && setting("NCCL_P2P_DISABLE", 0) == 0;
}

static size_t sender_bytes(void) { return blocks(COUNTERS); }
static size_t receiver_bytes(void) {
    return blocks(COUNTERS + setting("NCCL_BUFFSIZE", SIMPLE) + setting("NCCL_LL_BUFFSIZE", LL) +
                  setting("NCCL_LL128_BUFFSIZE", LL128));
}

size_t dry_ring_bytes(int ranks) {
    if (ranks < 2 || !cards_reach_each_other()) return 0;
    size_t channels = limited((size_t)dry_the_card()->ring_channels, "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS");
    size_t ring = channels * (sender_bytes() + receiver_bytes());
    /* A rank of a tree talks to both its neighbours in both directions; half of that is the ring's. Two ranks need no
     * more than the ring. */
    int with_trees = DRY_NCCL_VERSION < CONNECTS_WHEN_NEEDED || setting("NCCL_RUNTIME_CONNECT", 1) == 0;
    return with_trees && ranks > 2 ? 2 * ring : ring;
}

size_t dry_peer_bytes(int receives) {
    if (!cards_reach_each_other()) return 0;
    size_t channels = limited((size_t)dry_the_card()->peer_channels, NULL, "NCCL_MAX_P2P_NCHANNELS");
    return channels * (receives ? receiver_bytes() : sender_bytes());
}
