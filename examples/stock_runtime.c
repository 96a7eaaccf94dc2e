/* Ask a package with the C library of onnxruntime-genai alone: stock_runtime PACKAGE QUESTION IMAGE [IMAGE ...]

   The pip package of onnxruntime-genai contains the library and no header, so the functions that are called here are
   declared here. Build on Linux, with onnxruntime-genai installed in the Python of your choice:

     lib=$(python -c "import onnxruntime_genai as og; print(og.__path__[0])")
     cc -std=c99 stock_runtime.c -o stock_runtime "$lib/libonnxruntime-genai.so" -Wl,-rpath,"$lib"

   Run, telling the library where onnxruntime is:

     export ORT_LIB_PATH=$(python -c "import onnxruntime as o, glob; print(*glob.glob(o.__path__[0] + '/capi/libonnxruntime.so*'))")
     ./stock_runtime PACKAGE "What is in the picture?" picture.jpg
*/
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Opaque objects of the library. A function that can fail returns NULL for success, or a result with a message. */
typedef struct OgaResult OgaResult;
typedef struct OgaModel OgaModel;
typedef struct OgaTokenizer OgaTokenizer;
typedef struct OgaTokenizerStream OgaTokenizerStream;
typedef struct OgaMultiModalProcessor OgaMultiModalProcessor;
typedef struct OgaStringArray OgaStringArray;
typedef struct OgaImages OgaImages;
typedef struct OgaNamedTensors OgaNamedTensors;
typedef struct OgaGeneratorParams OgaGeneratorParams;
typedef struct OgaGenerator OgaGenerator;

const char *OgaResultGetError(const OgaResult *);
OgaResult *OgaCreateModel(const char *folder, OgaModel **);
OgaResult *OgaCreateTokenizer(const OgaModel *, OgaTokenizer **);
OgaResult *OgaTokenizerApplyChatTemplate(const OgaTokenizer *, const char *chat_template, const char *messages,
                                         const char *tools, bool add_generation_prompt, const char **prompt);
OgaResult *OgaCreateMultiModalProcessor(const OgaModel *, OgaMultiModalProcessor **);
OgaResult *OgaCreateStringArrayFromStrings(const char *const *strings, size_t count, OgaStringArray **);
OgaResult *OgaLoadImages(const OgaStringArray *paths, OgaImages **);
OgaResult *OgaProcessorProcessImages(const OgaMultiModalProcessor *, const char *prompt, const OgaImages *,
                                     OgaNamedTensors **);
OgaResult *OgaCreateGeneratorParams(const OgaModel *, OgaGeneratorParams **);
OgaResult *OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams *, const char *name, double value);
OgaResult *OgaCreateGenerator(const OgaModel *, const OgaGeneratorParams *, OgaGenerator **);
OgaResult *OgaGenerator_SetInputs(OgaGenerator *, const OgaNamedTensors *);
bool OgaGenerator_IsDone(const OgaGenerator *);
OgaResult *OgaGenerator_GenerateNextToken(OgaGenerator *);
OgaResult *OgaGenerator_GetNextTokens(const OgaGenerator *, const int32_t **tokens, size_t *count);
OgaResult *OgaCreateTokenizerStream(const OgaTokenizer *, OgaTokenizerStream **);
OgaResult *OgaTokenizerStreamDecode(OgaTokenizerStream *, int32_t token, const char **piece);
void OgaDestroyString(const char *);
void OgaDestroyTokenizerStream(OgaTokenizerStream *);
void OgaDestroyGenerator(OgaGenerator *);
void OgaDestroyGeneratorParams(OgaGeneratorParams *);
void OgaDestroyNamedTensors(OgaNamedTensors *);
void OgaDestroyImages(OgaImages *);
void OgaDestroyStringArray(OgaStringArray *);
void OgaDestroyMultiModalProcessor(OgaMultiModalProcessor *);
void OgaDestroyTokenizer(OgaTokenizer *);
void OgaDestroyModel(OgaModel *);
void OgaShutdown(void);

static void check(OgaResult *result) {
  if (result != NULL) {
    fprintf(stderr, "error: %s\n", OgaResultGetError(result));
    exit(1);
  }
}

/* One user message as JSON: a placeholder for each image, then the question, with its special characters escaped. */
static char *user_message(const char *question, size_t images) {
  char *json = malloc(128 + images * 32 + strlen(question) * 6);
  if (json == NULL) exit(1);
  char *end = json + sprintf(json, "[{\"role\": \"user\", \"content\": [");
  for (size_t i = 0; i < images; i++) end += sprintf(end, "{\"type\": \"image\"}, ");
  end += sprintf(end, "{\"type\": \"text\", \"text\": \"");
  for (const unsigned char *c = (const unsigned char *)question; *c != '\0'; c++) {
    if (*c < 0x20 || *c == '"' || *c == '\\')
      end += sprintf(end, "\\u%04x", *c);
    else
      *end++ = (char)*c;
  }
  strcpy(end, "\"}]}]");
  return json;
}

int main(int count, char **arguments) {
  if (count < 4) {
    fprintf(stderr, "usage: %s PACKAGE QUESTION IMAGE [IMAGE ...]\n", arguments[0]);
    return 2;
  }
  size_t images = (size_t)count - 3;

  OgaModel *model;
  OgaTokenizer *tokenizer;
  OgaMultiModalProcessor *processor;
  check(OgaCreateModel(arguments[1], &model));
  check(OgaCreateTokenizer(model, &tokenizer));
  check(OgaCreateMultiModalProcessor(model, &processor));

  char *messages = user_message(arguments[2], images);
  const char *prompt; /* the template that is NULL is the package's own */
  check(OgaTokenizerApplyChatTemplate(tokenizer, NULL, messages, NULL, true, &prompt));

  OgaStringArray *paths;
  OgaImages *pictures;
  OgaNamedTensors *inputs;
  check(OgaCreateStringArrayFromStrings((const char *const *)&arguments[3], images, &paths));
  check(OgaLoadImages(paths, &pictures));
  check(OgaProcessorProcessImages(processor, prompt, pictures, &inputs));

  OgaGeneratorParams *params;
  OgaGenerator *generator;
  OgaTokenizerStream *stream;
  check(OgaCreateGeneratorParams(model, &params));
  check(OgaGeneratorParamsSetSearchNumber(params, "max_length", 4096)); /* prompt and answer together, in tokens */
  check(OgaCreateGenerator(model, params, &generator));
  check(OgaGenerator_SetInputs(generator, inputs));
  check(OgaCreateTokenizerStream(tokenizer, &stream));

  while (!OgaGenerator_IsDone(generator)) {
    const int32_t *tokens;
    size_t tokens_count;
    const char *piece; /* belongs to the stream */
    check(OgaGenerator_GenerateNextToken(generator));
    check(OgaGenerator_GetNextTokens(generator, &tokens, &tokens_count));
    check(OgaTokenizerStreamDecode(stream, tokens[0], &piece));
    fputs(piece, stdout);
    fflush(stdout);
  }
  putchar('\n');

  OgaDestroyTokenizerStream(stream);
  OgaDestroyGenerator(generator);
  OgaDestroyGeneratorParams(params);
  OgaDestroyNamedTensors(inputs);
  OgaDestroyImages(pictures);
  OgaDestroyStringArray(paths);
  OgaDestroyString(prompt);
  free(messages);
  OgaDestroyMultiModalProcessor(processor);
  OgaDestroyTokenizer(tokenizer);
  OgaDestroyModel(model);
  OgaShutdown();
  return 0;
}
