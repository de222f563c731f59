// Pages read from the file system may start no workers: there the search runs in a hidden frame.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.answer = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.loaded = new Promise((done) => this.frame.addEventListener("load", done));
      this.frame.srcdoc = `<script>postMessage = (data) => frameElement.answer(data)</script><script src="${url}"></script>`;
      document.body.append(this.frame);
    }
    postMessage(data) {
      this.loaded.then(() => {
        const inner = this.frame.contentWindow;
        inner.dispatchEvent(new inner.MessageEvent("message", { data }));
      });
    }
    terminate() {
      this.frame.remove();
    }
  };

// An option is searched for as its words: the search takes the dashes before them for an operator and finds nothing.
{
  const post = Worker.prototype.postMessage;
  const words = (message) =>
    typeof message?.data === "string" ? { ...message, data: message.data.replace(/(^|\s)-+(?=\w)/g, "$1") } : message;
  Worker.prototype.postMessage = function (message, ...rest) {
    return post.call(this, words(message), ...rest);
  };
}
