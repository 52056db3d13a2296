// What the Node clients' scripts share, as checks.py.

export const BASE = process.env.BASE_URL, MODEL = process.env.MODEL;
export const QUESTION = "Say hello to the cat.";

export async function check(name, call) {
  let how = "works", why = "";
  try {
    if (!await call()) [how, why] = ["broken", "returned nothing"];
  } catch (error) {
    const status = error.status ?? error.statusCode ?? error.lastError?.statusCode
      ?? error.cause?.statusCode;
    how = status >= 400 && status < 500 ? "refused" : "broken";
    why = `${error.name}: ${error.message}`;
  }
  console.log(JSON.stringify({check: name, how, why: why.replace(/\s+/g, " ").slice(0, 300)}));
}
