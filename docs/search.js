// Leaves words such as "of" out of queries. The search takes each word for the beginning of others: without
// this "a" finds "accumulate", and ranks it above the words that matter.
const COMMON = new Set(
  "a an and are as at be by can do does for from how i if in into is it my of on or per that the this to use using what when which why with".split(" ")
);
const QUERY = 2; // the kind of message
const post = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (message, ...rest) {
  if (message && message.type === QUERY) {
    const words = message.data.split(/\s+/).filter(word => !COMMON.has(word.toLowerCase()));
    if (words.some(word => word)) message = { ...message, data: words.join(" ") };
  }
  return post.call(this, message, ...rest);
};
