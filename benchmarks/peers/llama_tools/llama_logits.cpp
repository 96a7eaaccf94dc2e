// Logits that llama.cpp computes for given token ids, every row of ids as a text of its own.
// Usage: llama-logits FILE.gguf IDS ROWS COLUMNS THREADS OUTPUT
// IDS has ROWS x COLUMNS int32 values; OUTPUT becomes ROWS x COLUMNS x vocabulary float32 values, both in native order.
#include "llama.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

static void quiet(enum ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        std::fputs(text, stderr);
    }
}

static int fail(const char * what) {
    std::fprintf(stderr, "llama-logits: %s\n", what);
    return 1;
}

int main(int argc, char ** argv) {
    if (argc != 7) {
        return fail("usage: llama-logits FILE.gguf IDS ROWS COLUMNS THREADS OUTPUT");
    }
    const int rows = std::atoi(argv[3]), columns = std::atoi(argv[4]), threads = std::atoi(argv[5]);
    if (rows < 1 || columns < 1 || threads < 1) {
        return fail("ROWS, COLUMNS and THREADS are positive numbers");
    }
    std::vector<int32_t> ids(static_cast<size_t>(rows) * columns);
    std::ifstream input(argv[2], std::ios::binary);
    if (!input.read(reinterpret_cast<char *>(ids.data()), ids.size() * sizeof(int32_t))) {
        return fail("the file of token ids is missing or too short");
    }

    llama_log_set(quiet, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == nullptr) {
        return fail("the model cannot be loaded");
    }
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_context_params settings = llama_context_default_params();
    settings.n_ctx = settings.n_batch = settings.n_ubatch = columns;
    settings.n_threads = settings.n_threads_batch = threads;
    llama_context * context = llama_init_from_model(model, settings);
    if (context == nullptr) {
        return fail("no context can be made");
    }

    std::ofstream output(argv[6], std::ios::binary);
    llama_batch batch = llama_batch_init(columns, 0, 1);
    for (int row = 0; row < rows; row++) {
        llama_memory_clear(llama_get_memory(context), true);
        batch.n_tokens = columns;
        for (int column = 0; column < columns; column++) {
            const int32_t id = ids[static_cast<size_t>(row) * columns + column];
            if (id < 0 || id >= vocabulary) {
                return fail("a token id is outside of the vocabulary");
            }
            batch.token[column] = id;
            batch.pos[column] = column;
            batch.n_seq_id[column] = 1;
            batch.seq_id[column][0] = 0;
            batch.logits[column] = 1;
        }
        if (llama_decode(context, batch) != 0) {
            return fail("decoding failed");
        }
        for (int column = 0; column < columns; column++) {
            const float * logits = llama_get_logits_ith(context, column);
            output.write(reinterpret_cast<const char *>(logits), sizeof(float) * vocabulary);
        }
    }
    output.close();
    if (!output) {
        return fail("the logits cannot be written");
    }
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
