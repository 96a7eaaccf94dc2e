// Stores conversations in this browser's IndexedDB and settings in its localStorage; the server stores neither.

function opened() {
  return new Promise((done, failed) => {
    const request = indexedDB.open("vlpack", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
}

async function run(mode, action) {
  const base = await opened();
  try {
    return await new Promise((done, failed) => {
      const request = action(base.transaction("conversations", mode).objectStore("conversations"));
      request.onsuccess = () => done(request.result);
      request.onerror = () => failed(request.error);
    });
  } finally {
    base.close();
  }
}

export const all = async () => (await run("readonly", (store) => store.getAll())).sort((a, b) => b.changed - a.changed);
export const keep = (conversation) => run("readwrite", (store) => store.put({ ...conversation, changed: Date.now() }));
export const forget = (id) => run("readwrite", (store) => store.delete(id));

export const settings = () => JSON.parse(localStorage.getItem("vlpack") || "{}");
export function keepSettings({ key, ...others }) {
  localStorage.setItem("vlpack", JSON.stringify(others));
  sessionStorage.setItem("vlpack-key", key || ""); // kept until the tab is closed
}
export const key = () => sessionStorage.getItem("vlpack-key") || "";
