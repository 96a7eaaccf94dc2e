// Times llama.cpp on a GGUF file: prefill of prompts of given lengths, and the tokens after each.
// Usage: node llama_cpp.mjs FILE.gguf THREADS NEW_TOKENS REPEAT LENGTH [LENGTH ...]
// Needs: npm install node-llama-cpp@3.22.1 (prebuilt llama.cpp) in the folder it runs in. Prints one JSON line.
import {createRequire} from "module";
import {pathToFileURL} from "url";
const require = createRequire(process.cwd() + "/");
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);

const [file, threads, fresh, repeat, ...lengths] = process.argv.slice(2);
// milliseconds: the clock's, or the processor time of this process
const usage = () => { const {user, system} = process.cpuUsage(); return (user + system) / 1000; };
const now = process.env.COMPARE_PROCESSOR_TIME ? usage : () => performance.now();
const llama = await getLlama({gpu: false, maxThreads: Number(threads), logLevel: "error"});
const begun = now();
const model = await llama.loadModel({modelPath: file});
const load = (now() - begun) / 1000;
const words = model.tokenize("The river rose in the night, and by morning the lower fields stood under water. ");
const works = [];
for (const length of lengths.map(Number)) {
    const context = await model.createContext({
        contextSize: length + Number(fresh) + 8, batchSize: 512, threads: Number(threads)
    });
    const first = [], token = [];
    for (let round = 0; round < Number(repeat); round++) {
        const head = model.tokenize(`${round}. `);  // every prompt begins differently
        const tokens = Array.from({length}, (_, at) => at < head.length ? head[at] : words[at % words.length]);
        const sequence = context.getSequence();
        let start = now(), count = 0;
        for await (const _ of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
            const at = now();
            if (count === 0) { first.push((at - start) / 1000); start = at; }
            if (++count === Number(fresh)) { token.push((at - start) / 1000 / (count - 1)); break; }
        }
        if (token.length <= round) throw new Error(`an end token came after ${count} tokens`);
        sequence.dispose();
    }
    const names = {name: `${length} tokens`, prompt_tokens: length};
    works.push({...names, first_token: first, token, resident: process.memoryUsage.rss()});
    await context.dispose();
}
console.log(JSON.stringify({load, works, version: `llama.cpp ${llama.llamaCppRelease.release}`}));
process.exit(0);
