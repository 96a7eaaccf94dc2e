// Times llama.cpp on many prompts at once, each a sequence of one context: seconds until all answers are there.
// Usage: node llama_many.mjs FILE.gguf THREADS NEW_TOKENS LENGTH REQUESTS [REQUESTS ...]
// Needs: npm install node-llama-cpp@3.22.1 (prebuilt llama.cpp) in the folder it runs in. Prints one JSON line.
import {createRequire} from "module";
import {pathToFileURL} from "url";
const require = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);

const [file, threads, fresh, length, ...counts] = process.argv.slice(2);
const llama = await getLlama({gpu: false, maxThreads: Number(threads), logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
let seed = 1;
const random = () => (seed = (seed * 48271) % 2147483647);  // tokens of words, so that no prompt begins as another
const found = [];
for (const count of [1, ...counts.map(Number)]) {  // the first one is not counted
    const context = await model.createContext({
        contextSize: Number(length) + Number(fresh) + 8, sequences: count, batchSize: 512, threads: Number(threads)
    });
    const begun = performance.now();
    const made = await Promise.all(Array.from({length: count}, async () => {
        const tokens = Array.from({length: Number(length)}, () => 1000 + random() % 50000);
        let made = 0;
        for await (const _ of context.getSequence().evaluate(tokens, {temperature: 0, yieldEogToken: true}))
            if (++made === Number(fresh)) break;
        return made;
    }));
    const seconds = (performance.now() - begun) / 1000, tokens = made.reduce((sum, one) => sum + one);
    found.push({requests: count, seconds, tokens_per_second: tokens / seconds, tokens});
    await context.dispose();
}
console.log(JSON.stringify({together: found.slice(1), version: `llama.cpp ${llama.llamaCppRelease.release}`}));
process.exit(0);
