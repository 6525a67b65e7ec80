// What llama.cpp computes of GGUF files: node llama_cpp.mjs FOLDER JOBS ANSWERS, with node-llama-cpp in FOLDER.
import fs from "fs";

const [folder, jobs, answers] = process.argv.slice(2);
const {getLlama} = await import(`${folder}/node_modules/node-llama-cpp/dist/index.js`);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const everyToken = {temperature: 1, topK: 0, topP: 1, minP: 0};

async function answer(job) {
    const model = await llama.loadModel({modelPath: job.path, useMmap: false});
    const context = await model.createContext({
        contextSize: 512, sequences: 1, threads: 1, flashAttention: false,
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    });
    const sequence = context.getSequence();
    const asked = job.ids.map((id) => [id, {generateNext: {probabilities: true, options: everyToken}}]);
    const found = await sequence.controlledEvaluate(asked);
    await sequence.clearHistory();
    const greedy = [];
    for await (const id of sequence.evaluate(job.ids, {temperature: 0, yieldEogToken: true})) {
        greedy.push(id);
        if (greedy.length >= job.greedy) break;
    }
    const answered = {
        probabilities: found.map((one) => Object.fromEntries(one.next.probabilities)),
        greedy,
        tokens: job.texts.map((text) => model.tokenize(text, job.special)),
        context: model.trainContextSize,
    };
    await context.dispose();
    await model.dispose();
    return answered;
}

const done = [];
for (const job of JSON.parse(fs.readFileSync(jobs))) done.push(await answer(job));
fs.writeFileSync(answers, JSON.stringify(done));
process.exit(0);
