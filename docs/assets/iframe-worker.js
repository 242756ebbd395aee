// Search without a server. Browsers start no worker for a page that was opened from the disk, and the theme's search
// runs in one. In its place this runs the same script in a hidden frame of the page, which it talks to as to a worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inner = frame.contentWindow
      // What the script says goes to us; it must not go to the frame, whose own messages are those that we send it.
      this.inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = this.inner.document.createElement("script")
      script.src = address
      this.ready = new Promise(done => script.addEventListener("load", done))
      this.inner.document.body.append(script)
    }

    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.inner.frameElement.remove()
    }
  }
}
