"""Reasons: what each word means that a quarantined row is counted under. The row itself also says what was found."""

READING = {
    "invalid_json": "the line is no JSON",
    "invalid_csv": "the line is no row of a CSV table",
    "wrong_column_count": "the row has more or fewer cells than the table has columns",
    "line_too_long": "the line, or paragraph, is too long to be a row",
}
FORMAT = {
    "wrong_format": "the row is not in the format of the file's other rows",
    "preference_pair": "the row has a chosen and a rejected answer (data.sources preference: chosen takes the first)",
    "not_text": "a number, list or picture is where text belongs",
    "null_text": "null or NaN is where text belongs",
    "empty_text": "the text is empty",
    "invalid_unicode": "a character is half of a surrogate pair",
    "bad_history": "history is no list of question and answer pairs",
    "bad_instances": "instances is no list of inputs and outputs",
    "bad_turn": "a turn is no object with a role and a text",
    "bad_tools": "a tool is no JSON schema of a function",
    "bad_tool_call": "a call is no JSON object of a function's name and arguments",
    "unknown_role": "a turn's role is none that is known (data.sources tags can name it)",
    "unweighted_turn": "a turn is marked as not to be learned (weight 0), which is not supported",
    "too_few_turns": "the conversation is one utterance alone",
    "no_assistant_turn": "nobody answers, so there is nothing to learn",
    "roles_out_of_order": "user and assistant do not take turns, the user first",
    "empty_answer": "an answer is empty",
    "empty_prompt": "a prompt is empty, or nothing was left of it once it was mended",
}
CLEANING = {
    "personal_data": "a phone, e-mail, ID or card number (data.clean.personal_data: quarantine)",
    "short_answer": "no answer is as long as data.clean.min_answer_chars",
    "copied_prompt": "an answer only repeats its prompt",
    "repetitive": "an answer says the same again and again",
    "refusal": "the answers only refuse",
    "other_identity": "an answer says it is another maker's assistant",
    "wrong_language": "the answers are in a language that data.clean.languages does not name",
    "too_long": "the conversation has more characters than data.max_chars",
}
ACROSS = {
    "leaked": "the row holds an evaluation item, which would then measure memory",
    "duplicate": "the same conversation came before",
    "near_duplicate": "nearly the same conversation came before (data.clean.near_duplicates)",
}
REASONS = {**READING, **FORMAT, **CLEANING, **ACROSS}
